"""The older form of tools: `functions` and `function_call` in requests, conversations and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from phloem.server.chat.body import ChatBody, Message


def is_old(body: ChatBody) -> bool:
    """Whether the answer is to be in the older form."""
    return bool(body.functions)


def renewed(body: ChatBody) -> ChatBody:
    """The same request with `tools`, of which only one is called at a time. One in today's form is left as it is.

    Raises:
        BadRequest: if both forms are mixed, or `function_call` has another shape.
    """
    if not body.functions and body.function_call in (None, "none", "auto"):
        return body
    if body.tools or body.tool_choice is not None:
        raise BadRequest("functions and tools exclude each other", param="functions")
    if not body.functions:
        raise BadRequest("function_call needs functions", param="function_call")
    for at, function in enumerate(body.functions):
        if not isinstance(function.get("name"), str):
            raise BadRequest(f"functions[{at}].name is missing", param=f"functions[{at}].name")
    choice = body.function_call
    if isinstance(choice, dict):
        if not isinstance(choice.get("name"), str) or set(choice) != {"name"}:
            raise BadRequest('function_call: expected "none", "auto" or {"name": ...}', param="function_call")
        choice = {"type": "function", "function": choice}
    elif choice not in (None, "none", "auto"):
        raise BadRequest(f"function_call {choice!r:.100} is not none, auto or a function", param="function_call")
    return msgspec.structs.replace(
        body,
        tools=[{"type": "function", "function": function} for function in body.functions],
        tool_choice=choice,
        parallel_tool_calls=False,
        functions=None,
        function_call=None,
    )


def renewed_messages(messages: list[Message]) -> list[Message]:
    """A conversation whose calls and results are all in today's form; results belong to the call before them."""
    found: list[Message] = []
    called = ""
    for at, message in enumerate(messages):
        if message.role == "assistant" and message.function_call is not None and not message.tool_calls:
            call: Any = message.function_call
            if not isinstance(call, dict) or not all(isinstance(call.get(name), str) for name in ("name", "arguments")):
                where = f"messages[{at}].function_call"
                raise BadRequest(f"{where}: expected a name and arguments", param=where)
            called = f"call_{at}"
            function = {"name": call["name"], "arguments": call["arguments"]}
            made = [{"id": called, "type": "function", "function": function}]
            message = msgspec.structs.replace(message, tool_calls=made, function_call=None)
        elif message.role == "function":
            message = msgspec.structs.replace(message, role="tool", tool_call_id=called or f"call_{at}")
        found.append(message)
    return found
