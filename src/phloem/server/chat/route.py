"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.request import new_id
from phloem.protocol.body import Parser
from phloem.server.chat.body import ChatBody
from phloem.server.chat.convert import to_request
from phloem.server.chat.write import ChatCompletion, ChatWriter
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import collect, stream
from phloem.server.transfer import meet, offered

router = APIRouter(tags=["openai"])
_parser = Parser(ChatBody)


@router.post(
    "/v1/chat/completions",
    **describe(body=ChatBody, answer=ChatCompletion, streams=True, errors=(404, *NEEDS_ENGINE)),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    door = door_of(request)
    body = await door.read(request, _parser)
    door.check_model(body.model)
    meet(body, door)
    asked = await to_request(body, door.client, door.info)
    model = door.adapt(asked.request, body.model, body.lora_path)
    door.check_batch(asked.request)
    call = await door.client.submit(asked.request)
    key = body.rid or new_id("chatcmpl-")
    writer = ChatWriter(body, key, model, door.client.tokenizer, asked.parsers())
    if asked.request.stream:
        return await stream(request, call, writer.events(call))
    answer = writer.answer(await collect(request, call))
    answer.kv_transfer_params = offered(body, door, request)
    return json_response(answer)
