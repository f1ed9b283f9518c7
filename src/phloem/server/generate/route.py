"""`POST /generate`: the native route; single or batch, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.protocol.body import Parser
from phloem.protocol.generate.body import GenerateBody
from phloem.protocol.generate.convert import is_batch, to_request
from phloem.protocol.generate.write import Cumulative, GenerateAnswer, PlainEvents, Renderer, strip
from phloem.server.door import door_of, json_response
from phloem.server.generate.capture import add_captured, check_capture
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import collect, event, stream

if TYPE_CHECKING:
    from phloem.client.call import Call

PAIR_HEADER = "x-phloem-pair"  # of our own gateway, which asks a decode server for both

router = APIRouter(tags=["native"])
_parser = Parser(GenerateBody)
_REF = {"$ref": f"#/components/schemas/{GenerateAnswer.__name__}"}
_ANSWER: dict[str, Any] = {"anyOf": [_REF, {"type": "array", "items": _REF}]}


@router.post("/generate", **describe(body=GenerateBody, answer=_ANSWER, streams=True, errors=NEEDS_ENGINE))
async def generate(request: Request) -> Response:
    """Continue a prompt, or several: text or token ids in, text and token ids out."""
    door = door_of(request)
    body = await door.read(request, _parser)
    asked = to_request(body)
    door.check_batch(asked)
    single = not is_batch(body) and asked.items[0].sampling.n == 1
    # Gateways put together what the prompt's logprobs are and what the answer's: prefill tells the former.
    apart = door.info.role == "decode" and PAIR_HEADER not in request.headers
    wanted = None if body.spec_capture is None else check_capture(body, asked)
    renderer = Renderer(body, door.client.tokenizer, prompts=not apart)
    call = await door.client.submit(asked)
    if asked.stream:
        incremental = door.config.server.incremental_streaming_output
        return await stream(request, call, _events(call, renderer, single, incremental))
    outputs = await collect(request, call)
    answers = [renderer.answer(output) for output in outputs]
    if wanted is not None:
        await add_captured(door, wanted, asked, answers)
    return json_response(strip(answers, single))


async def _events(call: Call, renderer: Renderer, single: bool, incremental: bool) -> AsyncGenerator[bytes, None]:
    numbers = {output.id: at for at, output in enumerate(call.outputs)}
    streams = {output.id: Cumulative(renderer) for output in call.outputs}
    begun: set[str] = set()
    async for outputs in call:
        events: list[bytes] = []
        for output in outputs:
            if incremental:
                data = renderer.news(output, output.id not in begun)
                begun.add(output.id)
            else:
                data = streams[output.id].render(output)
            if not single:
                data["index"] = numbers[output.id]
            events.append(event(data))
            if not output.item.return_logprob and not output.item.return_hidden:
                kept = None if incremental else streams[output.id]
                call.frame = PlainEvents(renderer, kept, None if single else numbers[output.id])
        yield b"".join(events)
