"""`POST /v1/completions`: prompts as text or token ids, single or several; `echo` and `logprobs`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.request import new_id
from phloem.protocol.body import Parser
from phloem.server.completions.body import CompletionBody
from phloem.server.completions.convert import to_request
from phloem.server.completions.write import Completion, CompletionWriter
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import collect, stream
from phloem.server.transfer import meet, offered

router = APIRouter(tags=["openai"])
_parser = Parser(CompletionBody)


@router.post(
    "/v1/completions",
    **describe(body=CompletionBody, answer=Completion, streams=True, errors=(404, *NEEDS_ENGINE)),
)
async def completions(request: Request) -> Response:
    """Continue a text, or several."""
    door = door_of(request)
    body = await door.read(request, _parser)
    door.check_model(body.model)
    meet(body, door)
    asked = to_request(body, door.client.tokenizer)
    model = door.adapt(asked, body.model, body.lora_path)
    door.check_batch(asked)
    call = await door.client.submit(asked)
    writer = CompletionWriter(body, body.rid or new_id("cmpl-"), model, door.client.tokenizer)
    if asked.stream:
        return await stream(request, call, writer.events(call))
    answer = writer.answer(await collect(request, call))
    answer.kv_transfer_params = offered(body, door, request)
    return json_response(answer)
