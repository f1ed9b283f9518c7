"""Request bodies of models that do not generate, in the spellings that clients send."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from phloem.protocol.body import Body, Later
from phloem.protocol.fields import HINT, Int32

# A text, several, token ids, or several lists of them.
Input = str | list[str | Int32 | list[Int32]]
Document = str | dict[str, Any]


class PooledBody(Body, kw_only=True):
    """Base: what all of them may say."""

    model: str | None = None
    user: str | None = None
    rid: str | list[str] | None = None
    priority: Int32 | None = None
    truncate_prompt_tokens: Int32 | None = None
    add_special_tokens: bool | None = None

    ignored: ClassVar[dict[str, str]] = {"user": HINT}
    pooled: ClassVar[bool | None] = True


class EmbeddingsBody(PooledBody, kw_only=True):
    """`POST /v1/embeddings`."""

    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int32 | None = None
    normalize: bool | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    input_type: str | None = None


class RerankBody(PooledBody, kw_only=True):
    """`POST /v1/rerank`: documents in the order of how well they answer the query."""

    query: str
    documents: list[Document]
    top_n: Int32 | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Int32 | None = None
    use_activation: bool | None = None
    rank_fields: list[str] | None = None
    instruct: str | None = None


class ClassifyBody(PooledBody, kw_only=True):
    """`POST /classify`."""

    input: Input | None = None
    text: Input | None = None
    use_activation: bool | None = None


class EncodeBody(PooledBody, kw_only=True):
    """`POST /encode`: what the model makes of texts, as it is."""

    text: str | list[str] | None = None
    input_ids: list[Int32 | list[Int32]] | None = None
    dimensions: Int32 | None = None
    normalize: bool | None = None
    sampling_params: Any = None
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None

    ignored: ClassVar[dict[str, str]] = {"sampling_params": "nothing is sampled", "user": HINT}
    later: ClassVar[dict[str, Later]] = {
        name: Later("multimodal", ("", [])) for name in ("image_data", "audio_data", "video_data")
    }
