"""`/parse_function_call` and `/separate_reasoning`: a model's text taken apart, without generating."""

from __future__ import annotations

from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.core.errors import BadRequest, ConfigError
from phloem.protocol.answers import Answer
from phloem.protocol.body import Later, Parser
from phloem.protocol.fields import AddressedBody
from phloem.server.chat.toolplan import check_tools
from phloem.server.door import door_of, json_response
from phloem.server.openapi import describe
from phloem.text import formats


class ParseCallsBody(AddressedBody, kw_only=True):
    """`POST /parse_function_call`: the tool calls in a model's text."""

    text: str
    tools: list[dict[str, Any]] | None = None
    tool_call_parser: str | None = None


class SeparateReasoningBody(AddressedBody, kw_only=True):
    """`POST /separate_reasoning`: the reasoning in a model's text."""

    text: str
    reasoning_parser: str | None = None
    return_blocks: bool | None = None

    later: ClassVar[dict[str, Later]] = {"return_blocks": Later("reasoning_blocks", (False,))}


class ParsedCalls(Answer, kw_only=True):
    """`calls`: tool_index, name and parameters (a JSON text)."""

    normal_text: str
    calls: list[dict[str, Any]]


class SeparatedReasoning(Answer, kw_only=True):
    reasoning_text: str
    text: str


router = APIRouter(tags=["tokens"])
_calls = Parser(ParseCallsBody)
_reasoning = Parser(SeparateReasoningBody)


@router.post("/parse_function_call", **describe(body=ParseCallsBody, answer=ParsedCalls))
async def parse_function_call(request: Request) -> Response:
    """The tool calls in a text, by the format that is named or that of the model."""
    door = door_of(request)
    body = await door.read(request, _calls)
    name = body.tool_call_parser
    try:
        form = formats.tool_format(name) if name is not None else door.info.tool_parser
    except ConfigError as error:
        raise BadRequest(error.message, param="tool_call_parser") from None
    if form is None:
        raise BadRequest("tool_call_parser is needed: the model has no format of its own", param="tool_call_parser")
    found = formats.TOOLS.module(form).Parser(check_tools(body.tools or [])).parse(body.text)
    calls = [
        {"tool_index": index, "name": call.name, "parameters": call.arguments} for index, call in enumerate(found.calls)
    ]
    return json_response(ParsedCalls(normal_text=found.text, calls=calls))


@router.post("/separate_reasoning", **describe(body=SeparateReasoningBody, answer=SeparatedReasoning))
async def separate_reasoning(request: Request) -> Response:
    """The reasoning in a text, by the format that is named or that of the model."""
    door = door_of(request)
    body = await door.read(request, _reasoning)
    name = body.reasoning_parser
    try:
        form = formats.thinking_format(name) if name is not None else door.info.reasoning_parser
    except ConfigError as error:
        raise BadRequest(error.message, param="reasoning_parser") from None
    if form is None:
        raise BadRequest("reasoning_parser is needed: the model has no format of its own", param="reasoning_parser")
    reasoning, text = formats.THINKING.module(form).Parser(None).parse(body.text)
    return json_response(SeparatedReasoning(reasoning_text=reasoning, text=text))
