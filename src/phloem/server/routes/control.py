"""Calls that change the server's state, flush, abort, pause, or that read its weights between two steps."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Query, Request
from msgspec import Meta
from starlette.responses import Response

from phloem.core.errors import BadRequest, PhloemError
from phloem.core.messages import ControlReply
from phloem.protocol.answers import ControlAnswer
from phloem.protocol.body import Body, Parser
from phloem.protocol.fields import AddressedBody
from phloem.protocol.known import INTERNAL
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe

MAX_TIMEOUT = 3600.0


class AbortBody(Body, kw_only=True):
    """`POST /abort_request`."""

    rid: str | None = None
    abort_all: bool | None = None
    abort_message: str | None = None
    finished_reason: Any = None
    http_worker_ipc: str | None = None
    weight_versions: Any = None

    ignored: ClassVar[dict[str, str]] = {
        "http_worker_ipc": INTERNAL,
        "weight_versions": INTERNAL,
        "abort_message": "the reason given to the client is fixed",
        "finished_reason": "the reason given to the client is fixed",
    }


class PauseBody(AddressedBody, kw_only=True):
    """`POST /pause_generation`. `mode`: abort (default), retract or in_place."""

    mode: str | None = None


class ContinueBody(AddressedBody, kw_only=True):
    """`POST /continue_generation`."""

    torch_empty_cache: bool | None = None

    ignored: ClassVar[dict[str, str]] = {
        **AddressedBody.ignored,
        "torch_empty_cache": "memory is given back when a step needs it",
    }


class RoleBody(Body, kw_only=True):
    """`POST /disaggregation_mode`. `mode`: prefill, decode or null."""

    mode: str


class FlushBody(AddressedBody, kw_only=True):
    """`POST /flush_cache`. `timeout_s`: as `timeout` in the address."""

    timeout_s: Annotated[float, Meta(ge=0, le=MAX_TIMEOUT)] | None = None


class WeightBody(Body, kw_only=True):
    """`/get_weights_by_name`. `truncate_size`: rows, from the first on."""

    name: str | None = None
    truncate_size: int | None = None


router = APIRouter(tags=["control"])
_abort = Parser(AbortBody)
_pause = Parser(PauseBody)
_continue = Parser(ContinueBody)
_flush = Parser(FlushBody)
_role = Parser(RoleBody)
_weight = Parser(WeightBody)
ROLES = ("null", "prefill", "decode")
PAUSE_MODES = ("abort", "retract", "in_place")
ROWS = 100  # of a weight, unasked
MAX_ROWS = 1 << 20
Rows = Annotated[int, Query(ge=1, le=MAX_ROWS, description="Rows of the weight, from the first on.")]
_NUMBERS: dict[str, Any] = {"type": "array", "items": {}}
Timeout = Annotated[float, Query(ge=0, le=MAX_TIMEOUT, description="Seconds to wait for running requests to end.")]


def refused(reply: ControlReply) -> None:
    """Raises what the engine refuses, with status 400."""
    if not reply.ok:
        error = PhloemError(reply.message or "the engine refused", param=reply.data.get("param"), code="refused")
        error.status, error.kind = 400, "invalid_request_error"
        raise error


def _answer(reply: ControlReply, done: str) -> Response:
    refused(reply)
    return json_response(ControlAnswer(success=True, message=reply.message or done))


@router.get("/flush_cache", **describe(answer=ControlAnswer, errors=(400, *NEEDS_ENGINE)))
@router.post(
    "/flush_cache", **describe(body=FlushBody, answer=ControlAnswer, body_required=False, errors=(400, *NEEDS_ENGINE))
)
@router.post("/reset_prefix_cache", **describe(answer=ControlAnswer, errors=(400, *NEEDS_ENGINE)))
async def flush_cache(request: Request, timeout: Timeout = 0.0) -> Response:
    """Forget every cached prefix (`/reset_prefix_cache` is vLLM's name for it).

    Refused while requests run, unless they end within `timeout` seconds.
    """
    door = door_of(request)
    body = await door.read(request, _flush, empty=b"{}")
    timeout = timeout or body.timeout_s or 0.0
    reply = await door.client.control("flush_cache", deadline=timeout + 30.0, timeout=timeout)
    return _answer(reply, "the cache is empty")


@router.post("/clear_hicache_storage_backend", **describe(answer=ControlAnswer, errors=(400, *NEEDS_ENGINE)))
@router.post("/hicache/storage-backend/clear", **describe(answer=ControlAnswer, errors=(400, *NEEDS_ENGINE)))
async def clear_hicache_storage_backend(request: Request) -> Response:
    """Forget what the store behind the cache has (`--hicache-storage-backend`); `/flush_cache` leaves it alone."""
    reply = await door_of(request).client.control("clear_hicache_storage", deadline=60.0)
    return _answer(reply, "the store is empty")


@router.post("/disaggregation_mode", **describe(body=RoleBody, answer=ControlAnswer, errors=(400, *NEEDS_ENGINE)))
async def disaggregation_mode(request: Request) -> Response:
    """Change the part of a server that was started with `--disaggregation-mode`: prompts, answers, or both.

    Refused while requests run or their rooms are open; take the server out of the gateway first.
    """
    door = door_of(request)
    body = await door.read(request, _role)
    if body.mode not in ROLES:
        raise BadRequest(f"mode: {body.mode!r:.100} is none of {', '.join(ROLES)}", param="mode")
    reply = await door.client.control("disaggregation_mode", mode=body.mode)
    refused(reply)
    door.info.duty.now = reply.data["mode"]
    if door.client.connection.ready is not None:
        door.client.connection.ready["disaggregation"] = reply.data
    return _answer(reply, "changed")


@router.post("/abort_request", **describe(body=AbortBody, answer=ControlAnswer, body_required=False))
async def abort_request(request: Request) -> Response:
    """End requests by id, or all; they finish with reason `abort`. An unknown id is not an error."""
    door = door_of(request)
    body = await door.read(request, _abort, empty=b"{}")
    if not body.rid and not body.abort_all:
        raise BadRequest("rid or abort_all is needed", param="rid")
    ended = door.client.abort(body.rid or "", everything=bool(body.abort_all))
    return json_response(ControlAnswer(success=True, message=f"{ended} aborted"))


@router.post(
    "/pause_generation", **describe(body=PauseBody, answer=ControlAnswer, body_required=False, errors=NEEDS_ENGINE)
)
async def pause_generation(request: Request) -> Response:
    """Stop planning steps. Requests in flight are aborted, sent back to the queue, or kept where they are."""
    door = door_of(request)
    body = await door.read(request, _pause, empty=b"{}")
    mode = body.mode or "abort"
    if mode not in PAUSE_MODES:
        raise BadRequest(f"mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r:.100}", param="mode")
    if mode == "abort":
        door.client.abort(everything=True)
    return _answer(await door.client.control("pause", mode=mode), "paused")


@router.post(
    "/continue_generation",
    **describe(body=ContinueBody, answer=ControlAnswer, body_required=False, errors=NEEDS_ENGINE),
)
async def continue_generation(request: Request) -> Response:
    """Go on after a pause."""
    door = door_of(request)
    await door.read(request, _continue, empty=b"{}")
    return _answer(await door.client.control("resume"), "running")


@router.get("/get_weights_by_name", **describe(answer=_NUMBERS, errors=(400, 413, *NEEDS_ENGINE)))
async def get_weights_by_name(
    request: Request, name: Annotated[str, Query(max_length=1000)] = "", truncate_size: Rows = ROWS
) -> Response:
    """The first rows of a weight by the name that its checkpoint gives it, read between two steps.

    A body, as the `POST` takes it, stands above the query.
    """
    body = await door_of(request).read(request, _weight, empty=b"{}")
    return await _weights(
        request, body.name or name, truncate_size if body.truncate_size is None else body.truncate_size
    )


@router.post("/get_weights_by_name", **describe(body=WeightBody, answer=_NUMBERS, errors=NEEDS_ENGINE))
async def post_weights_by_name(request: Request) -> Response:
    """The first rows of a weight by the name that its checkpoint gives it, read between two steps."""
    body = await door_of(request).read(request, _weight)
    return await _weights(request, body.name or "", ROWS if body.truncate_size is None else body.truncate_size)


async def _weights(request: Request, name: str, rows: int) -> Response:
    if not name:
        raise BadRequest("name is needed", param="name")
    if not 1 <= rows <= MAX_ROWS:
        raise BadRequest(f"truncate_size must be from 1 to {MAX_ROWS}, got {rows}", param="truncate_size")
    reply = await door_of(request).client.control("get_weights_by_name", name=name, rows=rows)
    refused(reply)
    return json_response(reply.data.get("weight") or [])
