"""Fields that many request bodies share, as a chain of structs: msgspec takes one base, and decodes all of it flat.

None (or null) means unset; names are those that existing clients send.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Protocol

from msgspec import Meta

from phloem.client.request import SessionStep
from phloem.core.errors import BadRequest
from phloem.protocol import known
from phloem.protocol.body import Body, Later

Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Strings = str | list[str] | None

HINT = "a hint to hosted services; nothing here depends on it"

# Fields that many bodies share, by the feature they belong to.
GRAMMAR = {name: Later("grammar", ("", {})) for name in ("regex", "ebnf", "json_schema", "structural_tag")}
GUIDED = {
    "response_format": Later("grammar", ({"type": "text"}, {})),
    **{name: Later("grammar", ("",)) for name in ("guided_json", "guided_regex", "guided_grammar")},
    "guided_choice": Later("grammar", ([],)),
    "guided_json_object": Later("grammar", (False,)),
    "structured_outputs": Later("grammar", ({},)),
    "extra_body": Later("grammar", ({},)),
}
ALONE = "this server shares no prompts: start with --disaggregation-mode"
DISAGGREGATION = {
    name: Later("disaggregation", (), ALONE) for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room")
}
COMMON_LATER: dict[str, Later] = {
    "lora_path": Later("lora", ("", []), "adapters are served with --enable-lora"),
    "data_parallel_rank": Later("data_parallel", (0,)),
    "return_hidden_states": Later("hidden_states", (False,)),
    **DISAGGREGATION,
}


NEEDS_FORMAT = Later("require_reasoning", (False,), "no reasoning format is known for this model")


_REMOVES = "clear_"  # edits that only take away what the model would read


def refuse_edits(edits: Any, where: str) -> None:
    """Refuse edits of the context that do more than to take something away; what those ask for may be left undone."""
    for at, edit in enumerate(edits if isinstance(edits, list) else [edits] if edits else []):
        kind = edit.get("type") if isinstance(edit, dict) else edit
        if not str(kind).startswith(_REMOVES):
            place = f"{where}[{at}]"
            raise BadRequest(f"not supported yet: {place} {kind!r:.100}", param=place, code="not_supported")


class Routed(Protocol):
    """A body that may name the replica that it is for."""

    data_parallel_rank: int | None
    routed_dp_rank: int | None


def dp_rank(body: Routed) -> int | None:
    """The replica that a body asks for. Raises BadRequest where its two names for that disagree."""
    one, other = body.data_parallel_rank, body.routed_dp_rank
    if one is not None and other is not None and one != other:
        message = f"data_parallel_rank {one} and routed_dp_rank {other} are two names of one thing"
        raise BadRequest(message, param="routed_dp_rank")
    return other if one is None else one


class SessionBody(Body, kw_only=True):
    """`session_params`: the session, and the request in it that this one goes on from."""

    id: str
    rid: str | None = None
    offset: Int32 | None = None
    replace: bool | None = None
    drop_previous_output: bool | None = None

    def step(self) -> SessionStep:
        return SessionStep(self.id, self.rid, self.offset or 0, bool(self.replace), bool(self.drop_previous_output))


class AddressedBody(Body, kw_only=True):
    """Base of bodies that SGLang's own processes address to one another."""

    rid: str | None = None
    http_worker_ipc: str | None = None

    ignored: ClassVar[dict[str, str]] = {"rid": known.INTERNAL, "http_worker_ipc": known.INTERNAL}


class StreamOptions(Body, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None

    ignored: ClassVar[dict[str, str]] = {"include_obfuscation": "chunks are never padded"}


class DrawingFields(Body, kw_only=True):
    """How tokens are chosen."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None


class StoppingFields(DrawingFields, kw_only=True):
    """And what ends the text."""

    stop: Strings = None
    stop_token_ids: list[Int32] | None = None
    stop_regex: Strings = None
    skip_special_tokens: bool | None = None
    custom_params: dict[str, Any] | None = None


class RequestFields(StoppingFields, kw_only=True):
    """And what a request to an OpenAI route says of itself: how it is answered, kept apart, and served."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    min_tokens: Count | None = None
    seed: Seed | None = None
    custom_logit_processor: str | None = None
    priority: Int32 | None = None
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    client_metadata: dict[str, Any] | None = None
    thread: Any = None
    session_id: str | None = None
    custom_labels: dict[str, str] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    images_config: dict[str, Any] | None = None
    watermark: Any = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    data_parallel_rank: Int32 | None = None
    routed_dp_rank: Int32 | None = None
    disagg_prefill_dp_rank: Int32 | None = None
    return_routed_experts: bool | None = None
    routed_experts_start_len: Int32 | None = None

    ignored: ClassVar[dict[str, str]] = {
        "safety_identifier": HINT,
        "prompt_cache_key": "prefixes are found by their tokens; use cache_salt to keep them apart",
        "prompt_cache_retention": HINT,
        "client_metadata": HINT,
        "thread": HINT,
        **known.IGNORED,
    }
    later: ClassVar[dict[str, Later]] = {
        "data_parallel_rank": Later("data_parallel", (0,)),
        **DISAGGREGATION,
        **known.LATER,
    }


class OpenAIBody(RequestFields, kw_only=True):
    """What chat and text completions have in common."""

    n: Int32 | None = None
    max_tokens: Count | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | dict[str, Any] | None = None
    structural_tag: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_decoding_backend: str | None = None
    structured_outputs: dict[str, Any] | None = None
    extra_body: dict[str, Any] | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    spaces_between_special_tokens: bool | None = None
    lora_path: str | None = None
    session_params: SessionBody | None = None
    rid: str | None = None
    return_hidden_states: bool | None = None
    return_cached_tokens_details: bool | None = None
    sampling_seed: Seed | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: Int32 | None = None
    return_spec_tokens_details: bool | None = None
    kv_transfer_params: Any = None

    ignored: ClassVar[dict[str, str]] = {
        **RequestFields.ignored,
        "metadata": HINT,
        "store": "nothing is ever stored",
        "guided_decoding_backend": "the server's grammar_backend decides",
    }
    later: ClassVar[dict[str, Later]] = {
        **RequestFields.later,
        **known.OPENAI_LATER,
        **COMMON_LATER,
        "kv_transfer_params": Later("disaggregation", ({},), ALONE),
        **GRAMMAR,
        **GUIDED,
    }
