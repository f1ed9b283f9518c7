"""Conversations without HTTP: from a chat body to a `GenerateRequest`, and the seam for parsers of what comes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from phloem.core.errors import BadRequest
from phloem.server.protocol import ChatBody, Message
from phloem.server.request import GenerateRequest, Item, new_id
from phloem.server.sampling import namespace, openai_params

if TYPE_CHECKING:
    from phloem.server.client import EngineClient
    from phloem.server.info import ModelInfo
    from phloem.server.template import ChatTemplate

LONG_CONVERSATION = 20_000  # characters: rendered in a thread, off the event loop
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})


@dataclass(slots=True)
class ParsedDelta:
    """What a stretch of output text means: plain content, reasoning, tool calls (in OpenAI's delta shape)."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class DeltaParser(Protocol):
    """One continuation's parser. `push` gets each text delta once, in order; `last` with the final one."""

    def push(self, text: str, last: bool) -> ParsedDelta: ...


class PlainText:
    """All of the text is content."""

    def push(self, text: str, last: bool) -> ParsedDelta:
        return ParsedDelta(content=text)


def delta_parsers(body: ChatBody, count: int) -> list[DeltaParser]:
    """The seam for `server/tools/` and `server/thinking/`: one parser for each continuation.

    Fields that ask for more than plain text have been refused in `Parser.parse` unless `ModelInfo.features` lists them.
    """
    return [PlainText() for _ in range(count)]


async def to_request(body: ChatBody, client: EngineClient, info: ModelInfo) -> GenerateRequest:
    """Render the conversation and set the sampling parameters.

    Raises:
        BadRequest: content that is not text, a template that refuses, or fields that do not fit together.
    """
    if body.add_generation_prompt and body.continue_final_message:
        raise BadRequest(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    if (body.top_logprobs or 0) > 0 and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    extra = body.chat_template_kwargs or {}
    for name in sorted(_RESERVED & set(extra)):
        raise BadRequest(f"chat_template_kwargs cannot set {name!r}", param="chat_template_kwargs")
    messages = [plain_message(message, at) for at, message in enumerate(body.messages)]
    text = await render(
        client.template,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        **extra,
    )
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    item = Item(
        sampling=openai_params(body, limit, info.generation_config),
        text=text,
        id=body.rid or new_id(),
        add_special_tokens=False,  # the template writes them
        return_logprob=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
        priority=body.priority or 0,
        namespace=namespace(body.cache_salt, body.extra_key),
    )
    return GenerateRequest([item], bool(body.stream))


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


def plain_message(message: Message, at: int) -> dict[str, Any]:
    """A message as templates read it: unset fields left out, text parts joined by newlines."""
    content = message.content
    if isinstance(content, list):
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
    for name in Message.ignored:
        plain.pop(name, None)
    plain["content"] = content
    return plain
