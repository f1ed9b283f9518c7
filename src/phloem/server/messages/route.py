"""`POST /v1/messages` and `/v1/messages/count_tokens`: the Anthropic Messages API."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.request import new_id
from phloem.protocol.answers import MessagesErrorAnswer
from phloem.protocol.body import Parser
from phloem.server.chat.convert import Conversation, to_request
from phloem.server.door import Door, door_of, json_response
from phloem.server.messages.body import CountTokensBody, MessagesBody
from phloem.server.messages.convert import to_chat
from phloem.server.messages.write import ENDING, MessagesAnswer, MessageWriter, TokenCount
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import collect, stream

router = APIRouter(tags=["anthropic"])
_messages = Parser(MessagesBody)
_count = Parser(CountTokensBody)


@router.post(
    "/v1/messages",
    **describe(
        body=MessagesBody,
        answer=MessagesAnswer,
        streams=True,
        errors=(404, *NEEDS_ENGINE),
        error=MessagesErrorAnswer,
    ),
)
async def create_message(request: Request) -> Response:
    """Answer a conversation, in Anthropic's shapes."""
    door = door_of(request)
    body = await door.read(request, _messages)
    asked = await _asked(door, body)
    model = door.adapt(asked.request, body.model)
    door.check_batch(asked.request)
    call = await door.client.submit(asked.request)
    writer = MessageWriter(new_id("msg_"), model, asked)
    if asked.request.stream:
        return await stream(request, call, writer.events(call), ENDING)
    return json_response(writer.whole((await collect(request, call))[0]))


@router.post(
    "/v1/messages/count_tokens",
    **describe(body=CountTokensBody, answer=TokenCount, errors=(404,), error=MessagesErrorAnswer),
)
async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation's prompt has."""
    door = door_of(request)
    asked = await _asked(door, await door.read(request, _count))
    item = asked.request.items[0]
    (prompt,) = await door.client.admission.prompts([item])
    return json_response(TokenCount(input_tokens=len(prompt.ids)))


# What chat calls it, and what it is called here.
NAMES = (
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
    (".function.parameters", ".input_schema"),
    (".function.", "."),
    ("max_completion_tokens", "max_tokens"),
)


async def _asked(door: Door, body: CountTokensBody) -> Conversation:
    door.check_model(body.model)
    chat = to_chat(body, door.info.reasoning_parser is not None)
    chat.refuse_later(door.info.features)
    return await to_request(chat, door.client, door.info, NAMES)
