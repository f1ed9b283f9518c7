"""`/v1/images/generations`: pictures from a prompt; `/v1/images/edits`: from pictures too."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.core.errors import BadRequest
from phloem.core.messages import Pixels
from phloem.diffusion.request import Facts
from phloem.protocol.body import Parser
from phloem.server.door import door_of, json_response
from phloem.server.images import write
from phloem.server.images.body import ImageEditsBody, ImagesBody, sign, source_of, wear
from phloem.server.images.given import pixels_of
from phloem.server.multipart import form_of
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import named_event, painted, stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from phloem.client.pictures import Painting
    from phloem.core.messages import Draw
    from phloem.server.door import Door

router = APIRouter(tags=["openai"])
_parser, _edits = Parser(ImagesBody), Parser(ImageEditsBody)
EMPTY = Pixels(1, 1, b"")  # for what is checked before anything is decoded
_ERRORS = (404, *NEEDS_ENGINE)


@router.post(
    "/v1/images/generations", **describe(body=ImagesBody, answer=write.ImagesAnswer, streams=True, errors=_ERRORS)
)
async def generations(request: Request) -> Response:
    """Pictures from a prompt; streamed, with pictures on the way."""
    door = door_of(request)
    door.info.check_draws()
    body = await door.read(request, _parser)
    adapter = door.check_model(body.model)
    write.check_format(body)
    draws = body.draws()
    wear(adapter, draws)
    return await _answer(door, request, body, draws)


@router.post(
    "/v1/images/edits", **describe(body=ImageEditsBody, answer=write.ImagesAnswer, streams=True, errors=_ERRORS)
)
async def edits(request: Request) -> Response:
    """Pictures from pictures and a prompt."""
    door = door_of(request)
    door.info.check_draws()
    body = await _read_edits(door, request)
    adapter = door.check_model(body.model)
    write.check_format(body)
    draws, sources = body.draws(), body.sources()
    wear(adapter, draws)
    facts = Facts(**door.client.picture_facts())
    facts.check(msgspec.structs.replace(draws[0], pictures=[EMPTY] * len(sources), mask=body.mask and EMPTY))
    given = [await pixels_of(door, source, "image") for source in sources]
    mask = None if body.mask is None else await pixels_of(door, source_of(body.mask, "mask"), "mask")
    if mask is not None and (mask.width, mask.height) != (given[0].width, given[0].height):
        raise BadRequest("mask: it has another size than the picture", param="mask")
    for draw in draws:
        draw.pictures, draw.mask = given, mask
    return await _answer(door, request, body, draws)


async def _read_edits(door: Door, request: Request) -> ImageEditsBody:
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        return await door.read(request, _edits)
    data = b"".join([part async for part in request.stream()])
    values = form_of(
        data, kind, frozenset({"image", "mask"}), frozenset({"image", "seed"}), frozenset({"cache", "lora"})
    )
    if len(values.get("seed", [])) == 1:
        (values["seed"],) = values["seed"]  # one alone is the first of all pictures
    return _edits.convert(values, door.info.features, form=True)


async def _answer(door: Door, request: Request, body: ImagesBody, draws: list[Draw]) -> Response:
    sign(draws, door.config.schedule.fair_queueing == "key")
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
