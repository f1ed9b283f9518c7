"""Conversations without HTTP: from a chat body to a request, and parsers for what comes back."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.client.request import GenerateRequest, Item, new_id
from phloem.core.errors import BadRequest
from phloem.protocol.fields import dp_rank
from phloem.protocol.media import MEDIA, seen, with_sound
from phloem.protocol.promises import promise
from phloem.protocol.rooms import place
from phloem.protocol.sampling import namespace, openai_names, openai_params
from phloem.protocol.structured import FIELDS, answer_shape
from phloem.server import token_ids
from phloem.server.chat import toolplan
from phloem.server.chat.body import ChatBody, Message
from phloem.server.chat.functions import renewed, renewed_messages
from phloem.text.answer import AnswerParser, FormattedAnswer, PlainAnswer, needs_special_tokens, thinking_parser
from phloem.text.tools._explain import explain, spell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.client.client import EngineClient
    from phloem.client.info import ModelInfo
    from phloem.core.request import SamplingParams
    from phloem.server.chat.toolplan import ToolPlan
    from phloem.text.template import ChatTemplate

PROMPT_TAIL = 16  # tokens
LONG_CONVERSATION = 20_000  # characters: rendered in a thread, off the event loop
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True)
class Conversation:
    """A chat request, ready to be submitted, and what is needed to read its answer."""

    request: GenerateRequest
    tools: ToolPlan
    reasoning: str | None
    stream_reasoning: bool
    prompt: str  # with `input_ids` its end alone
    continued: str | None

    def parsers(self) -> list[AnswerParser]:
        """One parser for each continuation."""
        return [self._parser() for _ in range(self.request.items[0].sampling.n)]

    def _parser(self) -> AnswerParser:
        if self.reasoning is None and not self.tools.tools:
            return PlainAnswer()
        thinking = thinking_parser(self.reasoning, self.prompt, self.continued)
        return FormattedAnswer(thinking, self.tools.parser(), self.stream_reasoning, self.tools.parallel)


async def to_request(
    body: ChatBody, client: EngineClient, info: ModelInfo, names: Sequence[tuple[str, str]] = ()
) -> Conversation:
    """Render the conversation and set the sampling parameters.

    `names`: what a route's client calls what chat calls otherwise, for errors: pairs of chat's and the other.

    Raises:
        BadRequest: content that is not text, a template that refuses, or fields that do not fit together.
    """
    try:
        asked = await _to_request(body, client, info)
    except BadRequest as error:
        message, param = (_called(text, names) for text in (error.message, error.param or ""))
        raise BadRequest(message, param=param or None, code=error.code) from None
    for item in asked.request.items:
        item.sampling.constraint_name = _called(item.sampling.constraint_name or "", names) or None
        item.names = {ours: _called(theirs, names) for ours, theirs in item.names.items()}
    return asked


def _called(text: str, names: Sequence[tuple[str, str]]) -> str:
    return functools.reduce(lambda said, pair: said.replace(*pair), names, text)


def _check(body: ChatBody) -> None:
    """Raises BadRequest for fields that exclude each other, or that need another."""
    if body.add_generation_prompt and body.continue_final_message:
        raise BadRequest(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    if (body.top_logprobs or 0) > 0 and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    token_ids.check(body)
    if not body.messages and body.input_ids is None:
        raise BadRequest("messages: at least one is needed", param="messages")


def _routed_start(body: ChatBody) -> int:
    """Raises BadRequest: the experts are asked for, and not the place where they are told."""
    start = body.routed_experts_start_len or 0
    if body.return_routed_experts and not body.return_meta_info:
        text = "return_routed_experts: they stand in meta_info, ask for return_meta_info too"
        raise BadRequest(text, param="return_routed_experts")
    if start < 0:
        raise BadRequest(f"routed_experts_start_len: {start} is below 0", param="routed_experts_start_len")
    return start


async def _to_request(body: ChatBody, client: EngineClient, info: ModelInfo) -> Conversation:
    _check(body)
    body = renewed(body)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    sampling = openai_params(body, limit, info.generation_config)
    answer = answer_shape(sampling)
    tools = toolplan.plan(body.tools, body.tool_choice, body.parallel_tool_calls, info.tool_parser, answer)
    constrain(sampling, tools, info)
    reasoning = info.reasoning_parser if body.separate_reasoning is not False else None
    messages, pictures = seen(plain_messages(body.messages or []), client.pictures, client.template)
    pictures = with_sound(pictures, body.use_audio_in_video, body.mm_processor_kwargs)
    if pictures and body.input_ids is not None:
        raise BadRequest("input_ids have no media: send messages", param="input_ids")
    text = (
        _tail(body.input_ids, client)
        if body.input_ids is not None
        else await render(
            client.template,
            with_tools(messages, tools, info),
            tools=None if info.explain_tools else tools.tools or None,
            add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
            continue_final_message=bool(body.continue_final_message),
            **template_kwargs(body.chat_template_kwargs, body.reasoning_effort, body.thinking),
        )
    )
    if needs_special_tokens(client.tokenizer, tools.parser(), reasoning):
        sampling.skip_special_tokens = False
    item = Item(
        sampling=sampling,
        text=text if body.input_ids is None else None,
        ids=body.input_ids,
        id=body.rid or new_id(),
        add_special_tokens=False,  # the template writes them
        return_logprob=bool(body.logprobs) or body.prompt_logprobs is not None,
        logprob_start=-1 if body.prompt_logprobs is None else 0,
        top_logprobs=max(body.top_logprobs or 0, body.prompt_logprobs or 0),
        priority=body.priority or 0,
        namespace=namespace(body.cache_salt, body.extra_key),
        reasons=(reasoning is not None or bool(body.require_reasoning)) and not tools.at_once,
        session=body.session_params.step() if body.session_params is not None else None,
        names=openai_names(
            "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens", "prompt_logprobs"
        ),
        return_hidden=bool(body.return_hidden_states),
        return_routed=bool(body.return_routed_experts),
        routed_start=_routed_start(body),
        thinking_budget=body.max_thinking_tokens,
        dp_rank=dp_rank(body),
        pictures=pictures,
    )
    place([item], body)
    promise([item], body)
    return Conversation(
        GenerateRequest([item], bool(body.stream)),
        tools,
        reasoning,
        body.stream_reasoning is not False,
        text,
        _last_text(messages[-1]["content"]) if body.continue_final_message and messages else None,
    )


def _last_text(content: Any) -> str:
    if isinstance(content, list):
        content = content[-1].get("text", "") if content else ""
    return str(content or "")


def _tail(ids: list[int], client: EngineClient) -> str:
    """The end of a prompt of ids as text: it says whether a reasoning block is open."""
    if client.tokenizer is None or any(not 0 <= token < client.info.vocab_size for token in ids[-PROMPT_TAIL:]):
        return ""
    return client.tokenizer.decode(ids[-PROMPT_TAIL:], skip_special_tokens=False)


def constrain(sampling: SamplingParams, tools: ToolPlan, info: ModelInfo) -> None:
    """Enforce what the tool fields ask for; it holds what the request asks of a text answer, or makes that void.

    Raises:
        BadRequest: if calls that are strict meet a structural tag, which could be of calls; or without grammar engine.
    """
    if tools.constraint is None:
        return
    if "grammar" not in info.features:
        raise BadRequest("not supported yet: tool_choice", param="tool_choice", code="not_supported")
    if sampling.structural_tag is not None and tools.place == "anywhere":
        raise BadRequest("strict tools and structural_tag exclude each other", param="tools")
    for name in FIELDS:
        setattr(sampling, name, None)
    setattr(sampling, *tools.constraint)
    sampling.constraint_name = tools.blamed


def with_tools(messages: list[dict[str, Any]], tools: ToolPlan, info: ModelInfo) -> list[dict[str, Any]]:
    """The messages as the template takes them: one that knows no tools gets them, and earlier calls, as text."""
    if info.spell_calls:
        messages = spell(messages)
    return explain(messages, tools.tools, tools.parser()) if info.explain_tools else messages


def template_kwargs(
    given: dict[str, Any] | None, effort: str | None = None, thinking: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`chat_template_kwargs`, checked, with what `reasoning_effort` and `thinking` mean to templates."""
    extra = dict(given or {})
    for name in sorted(_RESERVED & set(extra)):
        raise BadRequest(f"chat_template_kwargs cannot set {name!r}", param="chat_template_kwargs")
    if effort is not None:
        extra.setdefault("reasoning_effort", effort)
        if effort == "none":
            extra.setdefault("enable_thinking", False)
            extra.setdefault("thinking", False)
    kind = (thinking or {}).get("type")
    if kind in ("enabled", "disabled"):
        extra.setdefault("enable_thinking", kind == "enabled")
        extra.setdefault("thinking", kind == "enabled")
    elif kind not in (None, "adaptive", "auto"):
        raise BadRequest(f"thinking.type: {kind!r:.100} is none of enabled, disabled, adaptive", param="thinking.type")
    return extra


async def render(template: ChatTemplate | None, messages: list[dict[str, Any]], **options: Any) -> str:
    """The prompt text of a conversation. Long ones are rendered in a thread."""
    if template is None:
        raise BadRequest("this model has no chat template: use /v1/completions or /generate", param="messages")
    size = sum(len(message["content"] or "") for message in messages)
    try:
        if size > LONG_CONVERSATION:
            return await asyncio.to_thread(template.render, messages, **options)
        return template.render(messages, **options)
    except UnicodeError:
        raise BadRequest("messages hold lone surrogates: no valid Unicode", param="messages") from None


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as templates read them."""
    return [_plain_message(message, at) for at, message in enumerate(renewed_messages(messages))]


def _plain_message(message: Message, at: int) -> dict[str, Any]:
    """A message as templates read it: unset fields left out, text parts joined by newlines, but for those with
    pictures, which stay parts."""
    content: Any = message.content
    if isinstance(content, list) and any(part.type in MEDIA for part in content):
        content = [
            {name: value for name, value in msgspec.structs.asdict(part).items() if value is not None}
            for part in content
        ]
    elif isinstance(content, list):
        texts: list[str] = []
        for number, part in enumerate(content):
            where = f"messages[{at}].content[{number}]"
            if part.type != "text":
                raise BadRequest(
                    f"not supported yet: {where} of type {part.type!r:.100}", param=where, code="not_supported"
                )
            if part.text is None:
                raise BadRequest(f"{where}: text is missing", param=where)
            texts.append(part.text)
        content = "\n".join(texts)
    plain = {name: value for name, value in msgspec.structs.asdict(message).items() if value is not None}
    for name in (*Message.ignored, *Message.later):
        plain.pop(name, None)
    plain["content"] = content
    return plain
