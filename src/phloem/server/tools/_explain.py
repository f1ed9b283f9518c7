"""Tools for models whose chat template knows none: told in the system message, calls and results spelled as text.

The format is Hermes', which most open models have seen.
"""

from __future__ import annotations

import json
from typing import Any

_INTRODUCTION = """You can call these functions. Each line describes one, with its parameters as a JSON schema:
{listing}

To call a function, answer with its name and arguments as JSON between tags, once for each call:
<tool_call>
{{"name": "function name", "arguments": {{"parameter": "value"}}}}
</tool_call>"""


def explain(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The conversation with the tools in its system message, and earlier calls and results as text."""
    spelled = [_spell(message) for message in messages]
    if not tools:
        return spelled
    listing = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    told = _INTRODUCTION.format(listing=listing)
    if spelled and spelled[0].get("role") in ("system", "developer"):
        first = spelled[0]
        return [{**first, "content": f"{first.get('content') or ''}\n\n{told}".strip()}, *spelled[1:]]
    return [{"role": "system", "content": told}, *spelled]


def _spell(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message["content"]] if message.get("content") else []
    texts += [_spell_call(call) for call in calls]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(texts)}


def _spell_call(call: dict[str, Any]) -> str:
    function = call.get("function") or {}
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name", ""), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
