"""Adapters that come and go while the server runs, in SGLang's spelling and vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.core.errors import BadRequest
from phloem.protocol.answers import Answer
from phloem.protocol.body import Body, Parser
from phloem.protocol.known import INTERNAL
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe

if TYPE_CHECKING:
    from phloem.core.messages import ControlReply
    from phloem.server.door import Door


class LoadAdapterBody(Body, kw_only=True):
    """`POST /load_lora_adapter`. `lora_path`: a folder on the server's machine. `pinned`: it never gives way."""

    lora_name: str | None = None
    lora_path: str | None = None
    pinned: bool | None = None
    lora_id: str | None = None
    base_model_name: str | None = None
    load_inplace: bool | None = None
    rid: str | None = None
    http_worker_ipc: str | None = None

    ignored: ClassVar[dict[str, str]] = {
        "lora_id": INTERNAL,
        "base_model_name": "one server serves one base",
        "load_inplace": "an adapter of the same name is always replaced, and requests under way keep theirs",
        "rid": INTERNAL,
        "http_worker_ipc": INTERNAL,
    }


class UnloadAdapterBody(Body, kw_only=True):
    """`POST /unload_lora_adapter`."""

    lora_name: str | None = None
    lora_id: str | None = None
    lora_int_id: int | None = None
    rid: str | None = None
    http_worker_ipc: str | None = None

    ignored: ClassVar[dict[str, str]] = {
        "lora_id": INTERNAL,
        "lora_int_id": "adapters go by their names",
        "rid": INTERNAL,
        "http_worker_ipc": INTERNAL,
    }


class AdaptersAnswer(Answer, kw_only=True):
    """What a call has done, and path by name of the adapters that there are now."""

    success: bool
    message: str
    error_message: str | None = None
    loaded_adapters: dict[str, str]


router = APIRouter(tags=["control"])
_load = Parser(LoadAdapterBody)
_unload = Parser(UnloadAdapterBody)
_SAID: dict[str, Any] = {"answer": AdaptersAnswer, "errors": NEEDS_ENGINE}


@router.post("/load_lora_adapter", **describe(body=LoadAdapterBody, **_SAID))
@router.post("/v1/load_lora_adapter", **describe(body=LoadAdapterBody, **_SAID))
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter from a PEFT folder, or a new version of one; others go on meanwhile. 400 tells what is wrong."""
    door = door_of(request)
    body = await door.read(request, _load)
    name = _needed(body.lora_name, "lora_name")
    path = _needed(body.lora_path, "lora_path")
    if door.info.answers_to(name):
        raise BadRequest(f"{name!r:.200} is the name of the base", param="lora_name")
    return _answer(door, await door.client.load_adapter(name, path, bool(body.pinned)))


@router.post("/unload_lora_adapter", **describe(body=UnloadAdapterBody, **_SAID))
@router.post("/v1/unload_lora_adapter", **describe(body=UnloadAdapterBody, **_SAID))
async def unload_lora_adapter(request: Request) -> Response:
    """Forget an adapter. Its name is gone at once; requests that have begun with it end with it."""
    door = door_of(request)
    body = await door.read(request, _unload)
    return _answer(door, await door.client.unload_adapter(_needed(body.lora_name, "lora_name")))


def _needed(value: str | None, name: str) -> str:
    if not value:
        raise BadRequest(f"{name} is needed", param=name)
    return value


def _answer(door: Door, reply: ControlReply) -> Response:
    why = None if reply.ok else reply.message
    answer = AdaptersAnswer(
        success=reply.ok, message=reply.message, error_message=why, loaded_adapters=dict(door.adapters)
    )
    return json_response(answer, 200 if reply.ok else 400)
