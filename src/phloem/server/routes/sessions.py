"""`POST /open_session` and `/close_session`."""

from __future__ import annotations

from typing import ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.core.errors import BadRequest
from phloem.protocol.answers import ControlAnswer
from phloem.protocol.body import Parser
from phloem.protocol.fields import AddressedBody, Int32
from phloem.server.door import door_of, json_response
from phloem.server.openapi import describe


class OpenSessionBody(AddressedBody, kw_only=True):
    """`POST /open_session`. `timeout`: seconds without a request after which the session closes by itself.

    `streaming`: each request goes on from the last one, one at a time.
    """

    capacity_of_str_len: Int32 | None = None
    session_id: str | None = None
    streaming: bool | None = None
    timeout: float | None = None

    ignored: ClassVar[dict[str, str]] = {
        **AddressedBody.ignored,
        "capacity_of_str_len": "the context length bounds every prompt",
    }


class CloseSessionBody(AddressedBody, kw_only=True):
    """`POST /close_session`."""

    session_id: str


router = APIRouter(tags=["control"])
_open = Parser(OpenSessionBody)
_close = Parser(CloseSessionBody)


@router.post("/open_session", **describe(body=OpenSessionBody, answer={"type": "string"}, body_required=False))
async def open_session(request: Request) -> Response:
    """Open a session; answers with its id, which requests name in `session_params`."""
    door = door_of(request)
    body = await door.read(request, _open, empty=b"{}")
    if body.timeout is not None and not body.timeout > 0:
        raise BadRequest(f"timeout must be above 0, got {body.timeout:g}", param="timeout")
    return json_response(door.client.sessions.open(body.session_id, body.timeout, bool(body.streaming)))


@router.post("/close_session", **describe(body=CloseSessionBody, answer=ControlAnswer, errors=(404,)))
async def close_session(request: Request) -> Response:
    """Forget a session. Requests in flight go on."""
    door = door_of(request)
    body = await door.read(request, _close)
    door.client.sessions.close(body.session_id)
    return json_response(ControlAnswer(success=True, message="closed"))
