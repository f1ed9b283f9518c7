"""From a `/v1/messages` body to a chat body."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.protocol.media import block_source
from phloem.server.chat.body import ChatBody, ContentPart, Message
from phloem.server.chat.toolplan import without_foreign
from phloem.server.messages.body import (
    AS_IN_CHAT,
    Content,
    CountTokensBody,
    MessagesBody,
    ToolChoiceBody,
    TurnBody,
)

if TYPE_CHECKING:
    pass

# Keys of content blocks, as clients send them or send back what they got.
_KEYS: dict[str, frozenset[str]] = {
    "text": frozenset({"type", "text", "cache_control", "citations"}),
    "image": frozenset({"type", "source", "cache_control"}),
    "document": frozenset({"type", "source", "title", "context", "citations", "cache_control"}),
    "thinking": frozenset({"type", "thinking", "signature"}),
    "redacted_thinking": frozenset({"type", "data"}),
    "tool_use": frozenset({"type", "id", "name", "input", "cache_control", "caller"}),
    "tool_result": frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"}),
}
_ALLOWED = {
    "system": ("text",),
    "user": ("text", "image", "document", "tool_result"),
    "result": ("text", "image", "document"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
}


def to_chat(body: CountTokensBody, reasons: bool) -> ChatBody:
    """The chat request that answers it. `reasons`: the model writes reasoning that is known and parted.

    Raises:
        BadRequest: naming the message, block or field.
    """
    systems = [_text(body.system, "system", "system")] if body.system else []
    messages: list[Message] = []
    for at, turn in enumerate(body.messages):
        messages += _turn(turn, f"messages[{at}]")
    if systems:
        messages.insert(0, Message(role="system", content=systems[0]))
    last = messages[-1]
    chat = ChatBody(
        messages=messages,
        tools=[_tool(tool, at) for at, tool in without_foreign(body.tools or [], ("custom", "function"))] or None,
        continue_final_message=True if last.role == "assistant" and not last.tool_calls else None,
    )
    for name in AS_IN_CHAT:
        setattr(chat, name, getattr(body, name, None))
    if body.tool_choice is not None:
        _choose(chat, body.tool_choice)
    _output_config(chat, body)
    _thinking(chat, body, reasons)
    if isinstance(body, MessagesBody):
        chat.max_completion_tokens = body.max_tokens
        chat.stop = body.stop_sequences
        chat.routed_dp_rank = body.routed_dp_rank
    return chat


def _output_config(chat: ChatBody, body: CountTokensBody) -> None:
    config = body.output_config
    chat.reasoning_effort = config.effort if config is not None else None
    asked = {"output_config.format": config.format if config is not None else None, "output_format": body.output_format}
    given = {where: shape for where, shape in asked.items() if shape is not None}
    if len(given) > 1:
        raise BadRequest("output_format and output_config.format exclude each other", param="output_format")
    for where, shape in given.items():
        if shape.get("type") != "json_schema" or "schema" not in shape:
            raise BadRequest(f"{where}: expected a `schema` and the type json_schema", param=where)
        chat.response_format = shape


def _thinking(chat: ChatBody, body: CountTokensBody, reasons: bool) -> None:
    asked = body.thinking
    if asked is None or asked.type == "adaptive":
        return
    kwargs = dict(chat.chat_template_kwargs or {})
    if asked.type == "disabled":
        kwargs.setdefault("enable_thinking", False)
        kwargs.setdefault("thinking", False)
    else:
        if not reasons:
            raise BadRequest("thinking: this model has no known reasoning format", param="thinking")
        kwargs.setdefault("enable_thinking", True)
        kwargs.setdefault("thinking", True)
        chat.max_thinking_tokens = asked.budget_tokens
    chat.chat_template_kwargs = kwargs


def _choose(chat: ChatBody, choice: ToolChoiceBody) -> None:
    match choice.type:
        case "auto" | "none":
            chat.tool_choice = choice.type
        case "any":
            chat.tool_choice = "required"
        case "tool":
            if not choice.name:
                raise BadRequest("tool_choice.name is missing", param="tool_choice.name")
            chat.tool_choice = {"type": "function", "function": {"name": choice.name}}
    if choice.disable_parallel_tool_use:
        chat.parallel_tool_calls = False


def _tool(tool: dict[str, Any], at: int) -> dict[str, Any]:
    where = f"tools[{at}]"
    kind = tool.get("type")
    if kind not in (None, "custom", "function"):
        message = f"not supported: {where}.type {kind!r:.100}; only tools that the client runs are"
        raise BadRequest(message, param=f"{where}.type", code="not_supported")
    function: dict[str, Any] = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _turn(turn: TurnBody, where: str) -> list[Message]:
    """One message as chat messages: results of tools come before what the user says to them."""
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    parts: list[ContentPart] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    for number, block in enumerate(turn.content):
        place = f"{where}.content[{number}]"
        match _kind(block, turn.role, place):
            case "text":
                parts.append(ContentPart(type="text", text=_string(block, "text", place)))
            case "image":
                parts.append(ContentPart(type="image", image=block_source(block, place)))
            case "document":
                parts += _document(block, place)
            case "thinking":
                thoughts.append(_string(block, "thinking", place))
            case "tool_use":
                arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
                function = {"name": _string(block, "name", place), "arguments": arguments}
                calls.append({"id": _string(block, "id", place), "type": "function", "function": function})
            case "tool_result":
                content = _result(block.get("content") or "", f"{place}.content")
                results.append(Message(role="tool", tool_call_id=_string(block, "tool_use_id", place), content=content))
            case _:
                pass  # redacted_thinking: nobody can read it
    if results and not parts:
        return results
    said = Message(role=turn.role, content=_joined(parts) if parts or not calls else None)
    said.reasoning_content = "".join(thoughts) or None
    said.tool_calls = calls or None
    return [*results, said]


def _joined(parts: list[ContentPart]) -> str | list[ContentPart]:
    """Texts as one, but beside pictures and documents."""
    if any(part.type != "text" for part in parts):
        return parts
    return "\n".join(part.text or "" for part in parts)


def _result(content: Any, where: str) -> str | list[ContentPart]:
    """What a tool gave: a text, or blocks of text, pictures and documents."""
    blocks: list[Any] = content if isinstance(content, list) else []
    if not any(isinstance(block, dict) and block.get("type") in ("image", "document") for block in blocks):
        return _text(content, "system", where)
    parts: list[ContentPart] = []
    for number, block in enumerate(blocks):
        place = f"{where}[{number}]"
        if not isinstance(block, dict):
            raise BadRequest(f"{place}: expected a block", param=place)
        kind = _kind(block, "result", place)
        if kind == "image":
            parts.append(ContentPart(type="image", image=block_source(block, place)))
        elif kind == "document":
            parts += _document(block, place)
        else:
            parts.append(ContentPart(type="text", text=_string(block, "text", place)))
    return _joined(parts)


def _document(block: dict[str, Any], where: str) -> list[ContentPart]:
    """A PDF, a text, or blocks; behind its title and what is said of it."""
    before = [block[name] for name in ("title", "context") if block.get(name) is not None]
    if not all(isinstance(text, str) for text in before):
        raise BadRequest(f"{where}: title and context are texts", param=where)
    parts = [ContentPart(type="text", text="\n".join(before))] if before else []
    source: Any = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "text":
        return [*parts, ContentPart(type="text", text=_string(source, "data", f"{where}.source"))]
    if kind == "content":
        content = _result(source.get("content") or "", f"{where}.source.content")
        return [*parts, *(content if isinstance(content, list) else [ContentPart(type="text", text=content)])]
    media: Any = source.get("media_type") if isinstance(source, dict) else None
    if media not in (None, "application/pdf"):
        message = f"{where}.source.media_type: {media!r:.100} is not application/pdf"
        raise BadRequest(message, param=f"{where}.source.media_type", code="not_supported")
    return [*parts, ContentPart(type="document", file=block_source(block, where, "document"))]


def _kind(block: dict[str, Any], role: str, where: str) -> str:
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in _ALLOWED[role]:
        message = f"not supported: {where} of type {kind!r:.100}; known here: {', '.join(_ALLOWED[role])}"
        raise BadRequest(message, param=f"{where}.type", code="not_supported")
    for name, value in block.items():
        if value is not None and name not in _KEYS[kind]:
            raise BadRequest(f"unknown field '{where}.{name:.100}'", param=f"{where}.{name}", code="unknown_field")
    return kind


def _text(content: Content | Any, role: str, where: str) -> str:
    """A text, or blocks that are texts, as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise BadRequest(f"{where}: expected a text or a list of blocks", param=where)
    texts: list[str] = []
    for number, block in enumerate(content):
        _kind(block, role, f"{where}[{number}]")
        texts.append(_string(block, "text", f"{where}[{number}]"))
    return "\n".join(texts)


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        what = "is missing" if value is None else f"expected a text, got {type(value).__name__}"
        raise BadRequest(f"{where}.{name} {what}", param=f"{where}.{name}")
    return value
