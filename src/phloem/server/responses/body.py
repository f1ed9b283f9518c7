"""Request body of `/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from msgspec import Meta

from phloem.protocol import known
from phloem.protocol.body import Body, Later
from phloem.protocol.fields import HINT, Count, Int32, RequestFields, refuse_edits

# Fields that mean the same as in chat completions, and are handed on by name.
AS_IN_CHAT = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "ignore_eos",
    "skip_special_tokens",
    "logit_bias",
    "seed",
    "custom_logit_processor",
    "custom_params",
    "max_thinking_tokens",
    "separate_reasoning",
    "chat_template_kwargs",
    "priority",
    "slo_ttft_ms",
    "slo_itl_ms",
    "service_tier",
    "user",
    "cache_salt",
    "extra_key",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "parallel_tool_calls",
    "use_audio_in_video",
    "mm_processor_kwargs",
)


class ReasoningOptions(Body, kw_only=True):
    """`reasoning`. `effort` goes to the chat template; the reasoning itself is answered with, never a summary."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None

    ignored: ClassVar[dict[str, str]] = {
        "summary": "the whole reasoning is given",
        "generate_summary": "the whole reasoning is given",
    }


class TextOptions(Body, kw_only=True):
    """`text`: the format of the answer, as `response_format` of chat completions."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None

    ignored: ClassVar[dict[str, str]] = {"verbosity": HINT}


class ResponseFields(RequestFields, kw_only=True):
    """What is said of a response beside its input."""

    instructions: str | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Int32 | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    context_management: list[Any] | None = None
    moderation: dict[str, Any] | None = None
    max_tool_calls: Int32 | None = None
    prompt_cache_options: dict[str, Any] | None = None
    max_thinking_tokens: Int32 | None = None
    separate_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    request_id: str | None = None
    use_audio_in_video: bool | None = None

    personality: str | None = None

    ignored: ClassVar[dict[str, str]] = {
        **RequestFields.ignored,
        "personality": HINT,
        "context_management": "edits that clear old context are left undone: the whole conversation is read",
        "max_tool_calls": "it bounds tools that a server runs; here the client runs them",
        "prompt_cache_options": "prefixes are found by their tokens",
    }
    later: ClassVar[dict[str, Later]] = {
        **RequestFields.later,
        "request_id": Later("request_id", (), "responses have ids of the server's own making"),
        "truncation": Later("truncation", ("disabled",)),
        "conversation": Later("conversations"),
        "prompt": Later("prompt_templates"),
        "moderation": Later("moderation"),
        "use_audio_in_video": known.MEDIA_LATER["use_audio_in_video"],
    }

    def refuse_later(self, features: frozenset[str], where: str = "") -> None:
        super().refuse_later(features, where)
        refuse_edits(self.context_management, "context_management")


class ResponsesBody(ResponseFields, kw_only=True):
    """`POST /v1/responses`. The input is a text or a list of items: messages, calls, their outputs, reasoning."""

    pooled: ClassVar[bool | None] = False
    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]


class InputTokensBody(ResponseFields, kw_only=True):
    """`POST /v1/responses/input_tokens`: as for a response. Without input, what it goes on from is counted."""

    input: str | list[dict[str, Any]] | None = None
