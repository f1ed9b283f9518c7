"""What encoder servers answer: embeddings of pictures, videos and sounds, for servers of language models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.core.errors import BadRequest, EngineDead, PhloemError, QueueFull
from phloem.disagg.embeddings import AGAIN, MISFIT, PATH, RAW
from phloem.server.door import door_of
from phloem.server.openapi import describe

router = APIRouter(tags=["media"])
SECONDS = 300.0  # for what is before it in the queue
_RAW: dict[str, Any] = {"requestBody": {"required": True, "content": {RAW: {"schema": {"type": "string"}}}}}


@router.post(PATH, openapi_extra=_RAW, **describe(text=RAW, errors=(400, 409, 413, 503, 507)))
async def encode_media(request: Request) -> Response:
    """Embeddings of one item, for a server of language_only (`disagg/embeddings.py`): raw bytes there and back."""
    door = door_of(request)
    door.info.check_encodes()
    if door.client.draining:
        raise QueueFull("the server is shutting down and takes no new requests", code="draining")
    body = b"".join([part async for part in request.stream()])
    reply = await door.client.control("encode", SECONDS, ask=body)
    if not reply.ok:
        raise _refusal(reply.message, reply.data.get("status", 500))
    return Response(reply.data["made"], media_type=RAW)


def _refusal(message: str, status: int) -> PhloemError:
    known: dict[int, type[PhloemError]] = {400: BadRequest, MISFIT: BadRequest, AGAIN: EngineDead}
    error = known.get(status, PhloemError)(message)
    error.status = status
    return error
