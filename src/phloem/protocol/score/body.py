"""Request body of `/v1/score`."""

from __future__ import annotations

from typing import Any, ClassVar

from phloem.protocol.body import Body, Later
from phloem.protocol.fields import HINT, Int32


class ScoreBody(Body, kw_only=True):
    """`POST /v1/score`: how likely each label token is behind query and item; or, of a model that does not generate,
    how well `text_1` and `text_2` fit together."""

    query: str | list[Int32] | None = None
    items: str | list[str | Int32 | list[Int32]] | None = None
    label_token_ids: list[Int32] | None = None
    apply_softmax: bool | None = None
    item_first: bool | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: Int32 | None = None
    model: str | None = None
    user: str | None = None
    rid: str | None = None
    priority: Int32 | None = None
    temperature: float | None = None
    return_token_logprobs: bool | None = None
    return_pooled_hidden_states: bool | None = None
    score_extraction_token: str | None = None
    embed_override_token_id: Int32 | None = None
    query_embed_overrides: Any = None
    item_embed_overrides: Any = None

    ignored: ClassVar[dict[str, str]] = {"user": HINT}
    later: ClassVar[dict[str, Later]] = {
        "temperature": Later("score_temperature", (1,)),
        "return_token_logprobs": Later("score_logprobs", (False,)),
        "return_pooled_hidden_states": Later("pooling", (False,)),
        "score_extraction_token": Later("extraction_token", ("",)),
        "embed_override_token_id": Later("input_embeds"),
        "query_embed_overrides": Later("input_embeds"),
        "item_embed_overrides": Later("input_embeds"),
    }
