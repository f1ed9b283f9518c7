"""Request bodies of every route. None (or null) means unset; names are those that existing clients send."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from msgspec import Meta

from phloem.client.request import SessionStep
from phloem.server.body import Body, Later

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
DISAGGREGATION = {name: Later("disaggregation") for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room")}
COMMON_LATER: dict[str, Later] = {
    "lora_path": Later("lora", ("", [])),
    "data_parallel_rank": Later("data_parallel", (0,)),
    "return_hidden_states": Later("hidden_states", (False,)),
    **DISAGGREGATION,
}


NEEDS_FORMAT = Later("require_reasoning", (False,), "no reasoning format is known for this model")


class SessionBody(Body, kw_only=True):
    """`session_params`: the session, and the request in it that this one goes on from."""

    id: str
    rid: str | None = None
    offset: Int32 | None = None
    replace: bool | None = None
    drop_previous_output: bool | None = None

    def step(self) -> SessionStep:
        return SessionStep(self.id, self.rid, self.offset or 0, bool(self.replace), bool(self.drop_previous_output))


class SamplingBody(Body, kw_only=True):
    """`sampling_params` of `/generate`."""

    max_new_tokens: Count | None = None
    min_new_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: Strings = None
    stop_token_ids: list[Int32] | None = None
    stop_regex: Strings = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    n: Int32 | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: Seed | None = None
    custom_params: dict[str, Any] | None = None
    stream_interval: Int32 | None = None
    beam_width: Int32 | None = None

    later: ClassVar[dict[str, Later]] = {
        **GRAMMAR,
        "beam_width": Later("beam_search", (0, 1)),
    }


class GenerateBody(Body, kw_only=True):
    """`POST /generate`. A list in `text` or `input_ids` (of lists) makes a batch; other fields may then be lists."""

    text: Strings = None
    input_ids: list[Int32 | list[Int32]] | None = None
    input_embeds: list[Any] | None = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    rid: Strings = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: Int32 | list[Int32] | None = None
    top_logprobs_num: Int32 | list[Int32] | None = None
    token_ids_logprob: list[Int32 | list[Int32] | None] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    return_hidden_states: bool | list[bool] | None = None
    return_routed_experts: bool | None = None
    session_params: SessionBody | list[SessionBody | None] | None = None
    lora_path: str | list[str | None] | None = None
    custom_logit_processor: str | list[str | None] | None = None
    priority: Int32 | None = None
    extra_key: str | list[str | None] | None = None
    cache_salt: str | list[str | None] | None = None
    routing_key: str | None = None
    conversation_id: str | None = None
    data_parallel_rank: Int32 | None = None
    routed_dp_rank: Int32 | None = None
    bootstrap_host: Strings = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    return_prompt_token_ids: bool | None = None
    require_reasoning: bool | None = None
    max_thinking_tokens: Int32 | None = None
    background: bool | None = None
    no_logs: bool | None = None
    custom_labels: dict[str, str] | None = None
    model: str | None = None

    ignored: ClassVar[dict[str, str]] = {
        "model": "gateways add it; one server serves one model",
        "routing_key": "read by gateways in front of the server",
        "conversation_id": "read by gateways; prefixes are found by their tokens",
        "no_logs": "texts are never logged",
        "custom_labels": "metrics carry no labels of single requests",
    }
    later: ClassVar[dict[str, Later]] = {
        **COMMON_LATER,
        "input_embeds": Later("input_embeds", ([],)),
        "image_data": Later("images", ([], "")),
        "video_data": Later("video", ([], "")),
        "audio_data": Later("audio", ([], "")),
        "return_routed_experts": Later("routed_experts", (False,)),
        "routed_dp_rank": Later("data_parallel", (0,)),
        "require_reasoning": NEEDS_FORMAT,
    }

    def refuse_later(self, features: frozenset[str], where: str = "") -> None:
        super().refuse_later(features, where)
        several = self.sampling_params if isinstance(self.sampling_params, list) else [self.sampling_params]
        for params in several:
            if params is not None:
                params.refuse_later(features, "sampling_params.")


class StreamOptions(Body, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None

    ignored: ClassVar[dict[str, str]] = {"include_obfuscation": "chunks are never padded"}


class OpenAIBody(Body, kw_only=True):
    """What chat and text completions have in common: OpenAI's own fields, then the extensions."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Int32 | None = None
    max_tokens: Count | None = None
    stop: Strings = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Seed | None = None
    user: str | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    min_tokens: Count | None = None
    repetition_penalty: float | None = None
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
    stop_token_ids: list[Int32] | None = None
    stop_regex: Strings = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    custom_logit_processor: str | None = None
    custom_params: dict[str, Any] | None = None
    lora_path: str | None = None
    session_params: SessionBody | None = None
    rid: str | None = None
    priority: Int32 | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    bootstrap_host: str | None = None
    bootstrap_port: Int32 | None = None
    bootstrap_room: Seed | None = None
    data_parallel_rank: Int32 | None = None
    return_hidden_states: bool | None = None
    return_cached_tokens_details: bool | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    ignored: ClassVar[dict[str, str]] = {
        "user": HINT,
        "metadata": HINT,
        "store": "nothing is ever stored",
        "service_tier": HINT,
        "safety_identifier": HINT,
        "prompt_cache_key": "prefixes are found by their tokens; use cache_salt to keep them apart",
        "prompt_cache_retention": HINT,
        "guided_decoding_backend": "the server's grammar_backend decides",
    }
    later: ClassVar[dict[str, Later]] = {
        **COMMON_LATER,
        **GRAMMAR,
        **GUIDED,
    }


class CompletionBody(OpenAIBody, kw_only=True):
    """`POST /v1/completions`. The prompt is a string, token ids, or a list of either."""

    prompt: str | list[str | Int32 | list[Int32]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Int32 | None = None
    best_of: Int32 | None = None

    later: ClassVar[dict[str, Later]] = {
        **OpenAIBody.later,
    }


class ContentPart(Body, kw_only=True):
    """One part of a message's content; only `text` parts are served so far."""

    type: str
    text: str | None = None
    image_url: Any = None
    video_url: Any = None
    audio_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: str | None = None
    cache_control: Any = None

    ignored: ClassVar[dict[str, str]] = {"cache_control": HINT}


class Message(Body, kw_only=True):
    """One message of a conversation, as clients send it or send back what they got."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: Any = None
    annotations: Any = None
    function_call: Any = None
    parsed: Any = None

    ignored: ClassVar[dict[str, str]] = {
        name: "part of answers that clients send back; templates do not read it"
        for name in ("refusal", "audio", "annotations", "function_call", "parsed")
    }


class ChatBody(OpenAIBody, kw_only=True):
    """`POST /v1/chat/completions`. `input_ids` stand for the rendered messages where both are sent."""

    messages: list[Message] | None = None
    input_ids: list[Int32] | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    require_reasoning: bool | None = None
    max_thinking_tokens: Int32 | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None

    ignored: ClassVar[dict[str, str]] = {
        **OpenAIBody.ignored,
        "prediction": "a hint for speed; the answer is the same without",
        "verbosity": HINT,
    }
    later: ClassVar[dict[str, Later]] = {
        **OpenAIBody.later,
        "tools": Later("tools", ([],)),
        "tool_choice": Later("tools", ("none", "auto")),
        "functions": Later("functions", ([],)),
        "function_call": Later("functions", ("none", "auto")),
        "reasoning_effort": Later("reasoning", ("none",)),
        "separate_reasoning": Later("reasoning", (True,)),
        "stream_reasoning": Later("reasoning", (True,)),
        "require_reasoning": NEEDS_FORMAT,
        "modalities": Later("modalities", (["text"], [])),
        "audio": Later("audio"),
        "web_search_options": Later("web_search", ({},)),
    }


class ParseCallsBody(Body, kw_only=True):
    """`POST /parse_function_call`: the tool calls in a model's text."""

    text: str
    tools: list[dict[str, Any]] | None = None
    tool_call_parser: str | None = None


class SeparateReasoningBody(Body, kw_only=True):
    """`POST /separate_reasoning`: the reasoning in a model's text."""

    text: str
    reasoning_parser: str | None = None


class TokenizeBody(Body, kw_only=True):
    """`POST /tokenize`: a prompt, several, or a conversation."""

    prompt: Strings = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    model: str | None = None

    later: ClassVar[dict[str, Later]] = {"tools": Later("tools", ([],))}


class DetokenizeBody(Body, kw_only=True):
    """`POST /detokenize`: one list of token ids, or several."""

    tokens: list[Int32 | list[Int32]]
    skip_special_tokens: bool | None = None
    model: str | None = None


class OpenSessionBody(Body, kw_only=True):
    """`POST /open_session`. `timeout`: seconds without a request after which the session closes by itself.

    `streaming`: each request goes on from the last one, one at a time.
    """

    capacity_of_str_len: Int32 | None = None
    session_id: str | None = None
    streaming: bool | None = None
    timeout: float | None = None

    ignored: ClassVar[dict[str, str]] = {"capacity_of_str_len": "the context length bounds every prompt"}


class CloseSessionBody(Body, kw_only=True):
    """`POST /close_session`."""

    session_id: str


class AbortBody(Body, kw_only=True):
    """`POST /abort_request`."""

    rid: str | None = None
    abort_all: bool | None = None
    abort_message: str | None = None
    finished_reason: Any = None

    ignored: ClassVar[dict[str, str]] = {
        "abort_message": "the reason given to the client is fixed",
        "finished_reason": "the reason given to the client is fixed",
    }


class PauseBody(Body, kw_only=True):
    """`POST /pause_generation`. `mode`: abort (default), retract or in_place."""

    mode: str | None = None


class EmptyBody(Body, kw_only=True):
    """A body without fields."""
