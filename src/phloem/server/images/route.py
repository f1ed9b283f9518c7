"""`/v1/images/generations`: pictures from a prompt. `/v1/images/edits` says why there are none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.core.errors import BadRequest
from phloem.protocol.body import Parser
from phloem.server.door import door_of, json_response
from phloem.server.images import write
from phloem.server.images.body import ImagesBody
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import named_event, painted, stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from phloem.client.pictures import Painting

router = APIRouter(tags=["openai"])
_parser = Parser(ImagesBody)
_ERRORS = (404, *NEEDS_ENGINE)


@router.post(
    "/v1/images/generations", **describe(body=ImagesBody, answer=write.ImagesAnswer, streams=True, errors=_ERRORS)
)
async def generations(request: Request) -> Response:
    """Pictures from a prompt; streamed, with pictures on the way."""
    door = door_of(request)
    door.info.check_draws()
    body = await door.read(request, _parser)
    door.check_model(body.model)
    write.check_format(body)
    draws = body.draws()
    call = door.client.draw(draws)
    if body.stream:
        return await stream(request, call, _events(call, body))
    pictures = await painted(request, call)
    # Writing a file of a large picture takes longer than a token of a stream may wait.
    return json_response(await asyncio.to_thread(write.answer, pictures, [draw.seed for draw in draws], body))


async def _events(call: Painting, body: ImagesBody) -> AsyncGenerator[bytes, None]:
    async for told in call:
        if told.pixels:
            at = call.order[told.id]
            found = await asyncio.to_thread(write.event, told, at, call.draws[at].seed, body)
            yield named_event(found.type, found)


@router.post("/v1/images/edits", **describe(answer=write.ImagesAnswer, errors=(400, *_ERRORS)))
async def edits(request: Request) -> Response:
    """Refused: none of the families that are served takes a picture in."""
    door = door_of(request)
    door.info.check_draws()
    raise BadRequest(
        f"{door.info.served_model_name!r:.200} draws from a prompt alone: use /v1/images/generations",
        param="image",
        code="not_supported",
    )
