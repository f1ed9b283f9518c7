"""Request bodies of `/v1/messages`, the Anthropic Messages API."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from phloem.core.errors import BadRequest
from phloem.protocol.body import Body, Later
from phloem.protocol.fields import DISAGGREGATION, HINT, Int32, Seed, refuse_edits

# Fields that mean the same as in chat completions, and are handed on by name.
AS_IN_CHAT = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "stream",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "ignore_eos",
    "seed",
    "priority",
    "slo_ttft_ms",
    "slo_itl_ms",
    "service_tier",
    "cache_salt",
    "extra_key",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "chat_template_kwargs",
)
Content = str | list[dict[str, Any]]


class TurnBody(Body, kw_only=True):
    """One message. A last one of the assistant is continued."""

    role: Literal["user", "assistant", "system"]
    content: Content


class ThinkingBody(Body, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int32 | None = None
    display: str | None = None

    ignored: ClassVar[dict[str, str]] = {"display": "thinking is given whole"}


class ToolChoiceBody(Body, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfigBody(Body, kw_only=True):
    format: dict[str, Any] | None = None
    effort: str | None = None


class CountTokensBody(Body, kw_only=True):
    """`POST /v1/messages/count_tokens`."""

    messages: Annotated[list[TurnBody], Meta(min_length=1)]
    model: str | None = None
    system: Content | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfigBody | None = None
    output_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    context_management: dict[str, Any] | None = None
    speed: str | None = None
    thread: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    betas: list[str] | None = None

    ignored: ClassVar[dict[str, str]] = {
        "cache_control": HINT,
        "speed": HINT,
        "client_metadata": HINT,
        "betas": HINT,
        "context_management": "edits that clear old context are left undone: the whole conversation is read",
    }
    later: ClassVar[dict[str, Later]] = {
        "mcp_servers": Later("mcp", ([],)),
    }

    def refuse_later(self, features: frozenset[str], where: str = "") -> None:
        super().refuse_later(features, where)
        if self.thread is not None:
            # In these words the official client goes on without threads, and sends the whole conversation.
            raise BadRequest(
                "thread: this server holds no conversations; send all messages with each request",
                param="thread",
                code="thread_unsupported_request",
            )
        refuse_edits((self.context_management or {}).get("edits"), "context_management.edits")


class MessagesBody(CountTokensBody, kw_only=True):
    """`POST /v1/messages`."""

    pooled: ClassVar[bool | None] = False
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    container: str | dict[str, Any] | None = None
    inference_geo: str | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    seed: Seed | None = None
    priority: Int32 | None = None
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    routed_dp_rank: Int32 | None = None
    disagg_prefill_dp_rank: Int32 | None = None

    ignored: ClassVar[dict[str, str]] = {
        **CountTokensBody.ignored,
        "metadata": HINT,
        "inference_geo": HINT,
    }
    later: ClassVar[dict[str, Later]] = {
        **CountTokensBody.later,
        "container": Later("containers"),
        **DISAGGREGATION,
        "routed_dp_rank": Later("data_parallel", (0,)),
        "disagg_prefill_dp_rank": Later("disaggregation"),
    }
