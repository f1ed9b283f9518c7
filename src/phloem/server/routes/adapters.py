"""Adapters that come and go while the server runs, in SGLang's spelling and vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from fastapi import APIRouter, Request
from msgspec import Meta
from starlette.responses import Response

from phloem.core.adapters import SENT
from phloem.core.errors import BadRequest
from phloem.protocol.answers import Answer
from phloem.protocol.body import Body, Parser
from phloem.protocol.known import INTERNAL
from phloem.protocol.weights import Name, Size, announcement
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.payloads import decoded, on_their_way

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


class SendAdapterBody(Body, kw_only=True):
    """`POST /load_lora_adapter_from_tensors`. `config_dict`: what adapter_config.json would hold.
    `serialized_named_tensors` (or one text in `serialized_tensors`), `load_format`: as weights are sent."""

    lora_name: str | None = None
    config_dict: dict[str, Any] | None = None
    serialized_named_tensors: list[str] | None = None
    serialized_tensors: str | list[str] | None = None
    load_format: str | None = None
    pinned: bool | None = None
    added_tokens_config: dict[str, Any] | None = None
    expected_checksums: Any = None
    lora_id: str | None = None
    upsert: bool | None = None
    rid: str | None = None
    http_worker_ipc: str | None = None

    ignored: ClassVar[dict[str, str]] = {
        "lora_id": INTERNAL,
        "upsert": "an adapter of the same name is always replaced, and requests under way keep theirs",
        "rid": INTERNAL,
        "http_worker_ipc": INTERNAL,
    }


class BroadcastAdapterBody(Body, kw_only=True):
    """`POST /load_lora_adapter_from_distributed`: what is about to be broadcast in a group, in that order, as
    `/update_weights_from_distributed` has it."""

    lora_name: str | None = None
    config_dict: dict[str, Any] | None = None
    names: list[Name] | None = None
    dtypes: list[Name] | None = None
    shapes: list[Annotated[list[Size], Meta(max_length=8)]] | None = None
    group_name: Name | None = None
    load_format: str | None = None
    pinned: bool | None = None
    added_tokens_config: dict[str, Any] | None = None
    lora_id: str | None = None
    upsert: bool | None = None
    rid: str | None = None
    http_worker_ipc: str | None = None

    ignored: ClassVar[dict[str, str]] = SendAdapterBody.ignored


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


T = TypeVar("T")
router = APIRouter(tags=["control"])
_load = Parser(LoadAdapterBody)
_send, _unload = Parser(SendAdapterBody), Parser(UnloadAdapterBody)
_broadcast = Parser(BroadcastAdapterBody)
_SAID: dict[str, Any] = {"answer": AdaptersAnswer, "errors": NEEDS_ENGINE}


@router.post("/load_lora_adapter", **describe(body=LoadAdapterBody, **_SAID))
@router.post("/v1/load_lora_adapter", **describe(body=LoadAdapterBody, **_SAID))
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter from a PEFT folder, or a new version of one; others go on meanwhile. 400 tells what is wrong."""
    door = door_of(request)
    body = await door.read(request, _load)
    name = _free(door, body.lora_name)
    path = _needed(body.lora_path, "lora_path")
    return _answer(door, await door.client.load_adapter(name, path, bool(body.pinned)))


@router.post("/load_lora_adapter_from_tensors", **describe(body=SendAdapterBody, **_SAID))
async def load_lora_adapter_from_tensors(request: Request) -> Response:
    """Load an adapter that comes as tensors, or a new version of one. They are read as those of weights are: nothing of
    a payload is executed. The server keeps as many as it has places, and forgets the one unused for longest."""
    door = door_of(request)
    body = await door.read(request, _send)
    name = _free(door, body.lora_name)
    config = _needed(body.config_dict, "config_dict")
    for field in ("added_tokens_config", "expected_checksums"):
        if getattr(body, field):
            raise BadRequest(f"{field} is not supported", param=field, code="not_supported")
    whole = [body.serialized_tensors] if isinstance(body.serialized_tensors, str) else body.serialized_tensors
    texts = _needed(body.serialized_named_tensors or whole, "serialized_named_tensors")
    async with on_their_way(await decoded(texts, "serialized_named_tensors")) as sent:
        told = {"config": config, "load_format": body.load_format, **sent}
        return _answer(door, await door.client.load_adapter(name, SENT + name, bool(body.pinned), told))


@router.post("/load_lora_adapter_from_distributed", **describe(body=BroadcastAdapterBody, **_SAID))
async def load_lora_adapter_from_distributed(request: Request) -> Response:
    """Load an adapter, or a new version of one, whose tensors rank 0 of a trainer's group broadcasts."""
    door = door_of(request)
    body = await door.read(request, _broadcast)
    name = _free(door, body.lora_name)
    if body.added_tokens_config:
        raise BadRequest("added_tokens_config is not supported", param="added_tokens_config", code="not_supported")
    announced = announcement(body.names, body.dtypes, body.shapes, body.group_name, body.load_format)
    told = {"config": _needed(body.config_dict, "config_dict"), "broadcast": announced}
    return _answer(door, await door.client.load_adapter(name, SENT + name, bool(body.pinned), told))


@router.post("/unload_lora_adapter", **describe(body=UnloadAdapterBody, **_SAID))
@router.post("/v1/unload_lora_adapter", **describe(body=UnloadAdapterBody, **_SAID))
async def unload_lora_adapter(request: Request) -> Response:
    """Forget an adapter. Its name is gone at once; requests that have begun with it end with it."""
    door = door_of(request)
    body = await door.read(request, _unload)
    return _answer(door, await door.client.unload_adapter(_needed(body.lora_name, "lora_name")))


def _free(door: Door, name: str | None) -> str:
    name = _needed(name, "lora_name")
    if door.info.answers_to(name):
        raise BadRequest(f"{name!r:.200} is the name of the base", param="lora_name")
    return name


def _needed(value: T | None, name: str) -> T:
    if not value:
        raise BadRequest(f"{name} is needed", param=name)
    return value


def _answer(door: Door, reply: ControlReply) -> Response:
    why = None if reply.ok else reply.message
    answer = AdaptersAnswer(
        success=reply.ok, message=reply.message, error_message=why, loaded_adapters=dict(door.adapters)
    )
    return json_response(answer, 200 if reply.ok else 400)
