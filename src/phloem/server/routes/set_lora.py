"""Adapters of all pictures at once, in SGLang's spelling; a request's own `lora` goes before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.core.errors import BadRequest
from phloem.protocol.answers import Answer
from phloem.protocol.body import Body, Parser
from phloem.server.door import door_of, json_response
from phloem.server.images.body import MAX_LORA_SCALE, MAX_LORAS, within
from phloem.server.openapi import NEEDS_ENGINE, describe

if TYPE_CHECKING:
    from phloem.core.messages import ControlReply
    from phloem.server.door import Door

TARGETS = (None, "all", "transformer")


class SetLoraBody(Body, kw_only=True):
    """`POST /v1/set_lora`. A `lora_path` (a file or folder on the server's machine) that is new is loaded first."""

    lora_nickname: str | list[str]
    lora_path: str | list[str | None] | None = None
    target: str | list[str] | None = None
    strength: float | list[float] = 1.0


class MergeLoraBody(Body, kw_only=True):
    """`POST /v1/merge_lora_weights`: what was set is worn again; nothing is merged, adapters stay beside weights."""

    target: str | None = None
    strength: float | None = None


class UnmergeLoraBody(Body, kw_only=True):
    """`POST /v1/unmerge_lora_weights`: what was set is kept, and not worn."""

    target: str | None = None


class LoraAnswer(Answer, kw_only=True):
    status: str
    message: str


class LorasAnswer(Answer, kw_only=True):
    """`loaded_adapters`: nickname and path of each; `active`: what pictures wear that ask for nothing."""

    loaded_adapters: list[dict[str, Any]]
    active: dict[str, list[dict[str, Any]]]


router = APIRouter(tags=["control"])
_set, _merge, _unmerge = Parser(SetLoraBody), Parser(MergeLoraBody), Parser(UnmergeLoraBody)
_SAID: dict[str, Any] = {"answer": LoraAnswer, "errors": (400, 404, *NEEDS_ENGINE)}


@router.post("/v1/set_lora", **describe(body=SetLoraBody, **_SAID))
async def set_lora(request: Request) -> Response:
    """Let pictures that ask for nothing wear these adapters; an empty list lets them wear none."""
    door = _draws(request)
    body = await door.read(request, _set)
    names = [body.lora_nickname] if isinstance(body.lora_nickname, str) else body.lora_nickname
    if len(names) > MAX_LORAS or len(set(names)) < len(names) or not all(names):
        raise BadRequest(f"lora_nickname: at most {MAX_LORAS} names, each of them once", param="lora_nickname")
    for name in names:
        if door.info.answers_to(name):
            raise BadRequest(f"lora_nickname: {name!r:.200} is the name of the base", param="lora_nickname")
    paths = body.lora_path if isinstance(body.lora_path, list) else [body.lora_path] * len(names)
    scales = body.strength if isinstance(body.strength, list) else [body.strength] * len(names)
    targets = body.target if isinstance(body.target, list) else [body.target] * len(names)
    for field, given in (("lora_path", paths), ("strength", scales), ("target", targets)):
        if len(given) != len(names):
            raise BadRequest(f"{field}: {len(given)} for {len(names)} adapters", param=field)
    for target, scale in zip(targets, scales, strict=True):
        _check(target, scale)
    wanted = [list(one) for one in zip(names, paths, scales, strict=True)]
    return _answer(await door.client.set_lora(adapters=wanted, enabled=True))


@router.post("/v1/merge_lora_weights", **describe(body=MergeLoraBody, **_SAID))
async def merge_lora_weights(request: Request) -> Response:
    """Let pictures wear again what was set, as strongly as `strength` says."""
    door = _draws(request)
    body = await door.read(request, _merge)
    _check(body.target, body.strength)
    return _answer(await door.client.set_lora(enabled=True, scale=body.strength))


@router.post("/v1/unmerge_lora_weights", **describe(body=UnmergeLoraBody, **_SAID))
async def unmerge_lora_weights(request: Request) -> Response:
    """Let pictures that ask for nothing wear none; what was set is kept."""
    door = _draws(request)
    body = await door.read(request, _unmerge)
    _check(body.target, None)
    return _answer(await door.client.set_lora(enabled=False))


@router.get("/v1/list_loras", **describe(answer=LorasAnswer, errors=(400, 404, *NEEDS_ENGINE)))
async def list_loras(request: Request) -> Response:
    """The adapters that are loaded, and those that pictures wear."""
    reply = await _draws(request).client.set_lora()
    if not reply.ok:
        raise BadRequest(reply.message)
    loaded = reply.data["loaded"]
    active = [
        {"nickname": name, "path": loaded.get(name), "merged": False, "strength": scale}
        for name, scale, worn in reply.data["active"]
        if worn
    ]
    found = [{"nickname": name, "path": path} for name, path in loaded.items()]
    return json_response(LorasAnswer(loaded_adapters=found, active={"transformer": active} if active else {}))


def _draws(request: Request) -> Door:
    door = door_of(request)
    door.info.check_draws()
    return door


def _check(target: str | None, scale: float | None) -> None:
    if target not in TARGETS:
        raise BadRequest(f"target: {target!r:.100} takes no adapters, transformer does", param="target")
    within("strength", scale, -MAX_LORA_SCALE, MAX_LORA_SCALE)


def _answer(reply: ControlReply) -> Response:
    if not reply.ok:
        name = reply.message.partition(":")[0]
        raise BadRequest(reply.message, param=name if name.isidentifier() else None)
    return json_response(LoraAnswer(status="ok", message=reply.message or "the adapters are set"))
