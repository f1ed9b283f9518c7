"""Tools for models whose chat template does not show them: told in the system message, in the format that is parsed.

Where the template does not know calls and results either, those of earlier turns are spelled as text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phloem.text.tools._base import ToolParser

_INTRODUCTION = """You can call these functions. Each line describes one, with its parameters as a JSON schema:
{listing}

"""
_EXAMPLE = """To call a function, answer in this format, once for each call:
{example}"""
_OWN_FORMAT = "To call a function, answer in your own format for tool calls."


def explain(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], parser: ToolParser | None
) -> list[dict[str, Any]]:
    """The conversation with the tools in its system message."""
    if not tools or parser is None:
        return messages
    listing = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    told = _INTRODUCTION.format(listing=listing) + _how(parser)
    if messages and messages[0].get("role") in ("system", "developer"):
        first = messages[0]
        before = [first["content"], "\n\n"] if first.get("content") else []
        return [{**first, "content": _joined([*before, told])}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _how(parser: ToolParser) -> str:
    frame = parser.tag("function_name")
    if frame is None or parser.style != "json":
        return _OWN_FORMAT
    return _EXAMPLE.format(example=frame[0] + '{"parameter": "value"}' + frame[1])


def spell(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with its calls and results as text, results of one turn together."""
    found: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        if message.get("role") == "tool":
            before = [found.pop()["content"], "\n"] if after_result else []
            told = [*before, "<tool_response>\n", message.get("content") or "", "\n</tool_response>"]
            found.append({"role": "user", "content": _joined(told)})
            after_result = True
            continue
        after_result = False
        found.append(_without_calls(message) if message.get("tool_calls") else message)
    return found


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = "\n".join(_spell_call(call) for call in message["tool_calls"])
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": _joined([message["content"], "\n", calls] if message.get("content") else [calls])}


def _joined(contents: list[Any]) -> str | list[dict[str, Any]]:
    """Contents of messages one after the other: a text, or parts where one has pictures."""
    if all(isinstance(content, str) for content in contents):
        return "".join(contents)
    found: list[dict[str, Any]] = []
    for content in contents:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if found and part.get("type") == found[-1].get("type") == "text":
                found[-1] = {"type": "text", "text": found[-1]["text"] + part["text"]}
            else:
                found.append(part)
    return found


def _spell_call(call: dict[str, Any]) -> str:
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name", ""), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
