"""`/v1/responses` input: items to chat messages, and the body to a chat body."""

from __future__ import annotations

from typing import Any

import msgspec

from phloem.core.errors import BadRequest
from phloem.grammar.schema.numbers import as_double
from phloem.multimodal._reader import Source
from phloem.protocol.media import MEDIA, audio_source, file_source, source_of
from phloem.server.chat.body import ChatBody, ContentPart, Message
from phloem.server.chat.toolplan import without_foreign
from phloem.server.responses.body import AS_IN_CHAT, ResponseFields

LOGPROBS = "message.output_text.logprobs"
# What `include` may name besides: nothing of it exists here, or it is given anyway.
_HARMLESS = frozenset({"reasoning.encrypted_content"})
_KEYS: dict[str, frozenset[str]] = {
    "message": frozenset({"type", "role", "content", "id", "status", "phase"}),
    "function_call": frozenset(
        {"type", "id", "call_id", "name", "arguments", "status", "namespace", "caller", "parsed_arguments", "async"}
    ),
    "function_call_output": frozenset({"type", "id", "call_id", "output", "status", "name", "namespace", "caller"}),
    "reasoning": frozenset({"type", "id", "summary", "content", "encrypted_content", "status"}),
}
# OpenAI's, and those that it lacks as in chat.
_MEDIA_PARTS = ("input_image", "input_file", "input_audio", "input_video", "video_url", "audio_url")
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def to_chat(body: ResponseFields, messages: list[Message]) -> ChatBody:
    """The chat request that a response is made by. `messages`: the conversation, its input included.

    Raises:
        BadRequest: naming the item or field.
    """
    text = body.text.format if body.text is not None else None
    chosen = body.tool_choice
    for name in body.include or []:
        if name != LOGPROBS and name not in _HARMLESS:
            raise BadRequest(f"not supported yet: include {name!r:.100}", param="include", code="not_supported")
    wants_logprobs = LOGPROBS in (body.include or []) or bool(body.top_logprobs)
    return ChatBody(
        messages=with_instructions(body.instructions, messages),
        data_parallel_rank=body.data_parallel_rank,
        routed_dp_rank=body.routed_dp_rank,
        max_completion_tokens=body.max_output_tokens,
        stream=body.stream,
        tools=[_tool(tool, at) for at, tool in without_foreign(body.tools or [], ("function",))] or None,
        tool_choice=chosen,
        response_format=text,
        logprobs=True if wants_logprobs else None,
        top_logprobs=body.top_logprobs,
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
        **{name: getattr(body, name) for name in AS_IN_CHAT},
    )


def with_instructions(instructions: str | None, messages: list[Message]) -> list[Message]:
    """System messages at the beginning become one: many templates take no more. Parts of one stay what they are."""
    texts, parts = [instructions] if instructions else [], []
    rest = list(messages)
    while rest and rest[0].role == "system":
        content = rest.pop(0).content or ""
        if isinstance(content, str) and not parts:
            texts.append(content)
        else:
            parts += [ContentPart(type="text", text=content)] if isinstance(content, str) else content
    if not parts:
        return [Message(role="system", content="\n\n".join(texts)), *rest] if texts else rest
    before = [ContentPart(type="text", text="\n\n".join(texts) + "\n\n")] if texts else []
    return [Message(role="system", content=[*before, *parts]), *rest]


def messages_of(given: str | list[dict[str, Any]]) -> list[Message]:
    """Items as messages; what an assistant said, thought and called in a row is one message.

    Raises:
        BadRequest: naming the item.
    """
    if isinstance(given, str):
        return [Message(role="user", content=given)]
    found: list[Message] = []
    said: Message | None = None  # the assistant's message that is being gathered
    for at, item in enumerate(given):
        where = f"input[{at}]"
        kind = _kind(item, where)
        if kind in ("function_call", "reasoning") or (kind == "message" and item.get("role") == "assistant"):
            if said is None or (kind != "function_call" and (said.content or said.tool_calls)):
                said = Message(role="assistant")
                found.append(said)
            _say(said, item, kind, where)
            continue
        said = None
        if kind == "message":
            role = _string(item, "role", where)
            if role not in ("user", "system", "developer"):
                raise BadRequest(f"{where}.role: unknown role {role!r:.100}", param=f"{where}.role")
            content = _seen(item.get("content"), f"{where}.content")
            found.append(Message(role="system" if role == "developer" else role, content=content))
        else:
            output = _seen(item.get("output"), f"{where}.output")
            found.append(Message(role="tool", tool_call_id=_string(item, "call_id", where), content=output))
    return found


def _kind(item: dict[str, Any], where: str) -> str:
    kind = item.get("type", "message" if "role" in item else None)
    if not isinstance(kind, str) or kind not in _KEYS:
        message = f"not supported: {where} of type {kind!r:.100}; known: {', '.join(_KEYS)}"
        raise BadRequest(message, param=f"{where}.type", code="not_supported")
    for name, value in item.items():
        if value is not None and name not in _KEYS[kind]:
            raise BadRequest(f"unknown field '{where}.{name:.100}'", param=f"{where}.{name}", code="unknown_field")
    return kind


def _say(said: Message, item: dict[str, Any], kind: str, where: str) -> None:
    if kind == "message":
        said.content = _content(item.get("content"), f"{where}.content")
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        said.reasoning_content = _content(parts, f"{where}.content")
    else:
        name, arguments = _string(item, "name", where), _string(item, "arguments", where)
        call = {"id": _string(item, "call_id", where), "type": "function"}
        said.tool_calls = [*(said.tool_calls or []), {**call, "function": {"name": name, "arguments": arguments}}]


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        what = "is missing" if value is None else f"expected a text, got {type(value).__name__}"
        raise BadRequest(f"{where}.{name} {what}", param=f"{where}.{name}")
    return value


def _seen(content: Any, where: str) -> str | list[ContentPart]:
    """As `_content`, with pictures, sounds, videos and files among the parts."""
    parts: list[Any] = content if isinstance(content, list) else []
    if not any(isinstance(part, dict) and part.get("type") in _MEDIA_PARTS for part in parts):
        return _content(content, where)
    found: list[ContentPart] = []
    for number, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type") in _MEDIA_PARTS:
            found.append(ContentPart(type="file", file=_medium(part, f"{where}[{number}]")))
        else:
            found.append(ContentPart(type="text", text=_content([part], where, number)))
    return found


def _medium(part: dict[str, Any], where: str) -> Source:
    kind = part["type"]
    if kind == "input_file":
        return file_source(part, where)
    name = "input_audio" if kind == "input_audio" else f"{kind.removeprefix('input_').removesuffix('_url')}_url"
    if not part.get(name):
        if part.get("file_id") is not None:
            text = f"{where}.file_id: files are not kept here; send {name}"
            raise BadRequest(text, param=f"{where}.file_id", code="not_supported")
        raise BadRequest(f"{where}.{name} is missing", param=f"{where}.{name}")
    if kind == "input_audio":
        return audio_source(part[name], f"{where}.{name}")
    value = part[name]
    shown = {key: part[key] for key in ("fps", "num_frames") if part.get(key) is not None}
    if name == "video_url" and shown:  # beside an address or in its object
        value = {**(value if isinstance(value, dict) else {"url": value}), **shown}
    return source_of(value, f"{where}.{name}", MEDIA[name])


def _content(content: Any, where: str, first: int = 0) -> str:
    """A text, or parts that are texts, as one text. `first`: the number of the first of them, in errors."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where}: expected a text or a list of parts", param=where)
    texts: list[str] = []
    for number, part in enumerate(content, first):
        place = f"{where}[{number}]"
        if not isinstance(part, dict):
            raise BadRequest(f"{place}: expected an object", param=place)
        kind = part.get("type")
        if kind == "refusal":
            texts.append(_string(part, "refusal", place))
        elif kind in _TEXT_PARTS:
            texts.append(_string(part, "text", place))
        else:
            raise BadRequest(f"not supported yet: {place} of type {kind!r:.100}", param=place, code="not_supported")
    return "\n".join(texts)


def _tool(tool: dict[str, Any], at: int) -> dict[str, Any]:
    """A function in the flat shape of this route, in the nested one of chat."""
    kind = tool.get("type")
    if kind != "function":
        where = f"tools[{at}].type"
        raise BadRequest(f"not supported: {where} {kind!r:.100}; only functions are", param=where, code="not_supported")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def size_of(*parts: list[Any]) -> int:
    """Bytes that a conversation and its items take in the store, about."""
    return sum(len(msgspec.json.encode(part, enc_hook=as_double)) for part in parts)


def answer_message(texts: list[str], reasoning: list[str], calls: list[dict[str, Any]]) -> Message:
    """What the assistant answered, as the next turn of the conversation."""
    return Message(
        role="assistant",
        content="".join(texts) or None,
        reasoning_content="".join(reasoning) or None,
        tool_calls=calls or None,
    )
