"""Weights that change while the server runs, and memory that it gives back and takes again (docs/rl.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from phloem.protocol import weights as ask
from phloem.protocol.answers import ControlAnswer, Error
from phloem.protocol.body import Parser
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.payloads import decoded, on_their_way

if TYPE_CHECKING:
    from phloem.core.messages import ControlReply

router = APIRouter(tags=["weights"])
SECONDS = 3600.0  # for an update: a large checkpoint is read from a slow disk
RAW = "application/octet-stream"

_tensor, _disk, _group = Parser(ask.FromTensorBody), Parser(ask.FromDiskBody), Parser(ask.InitGroupBody)
_destroy, _distributed, _ipc = Parser(ask.DestroyGroupBody), Parser(ask.FromDistributedBody), Parser(ask.FromIpcBody)
_version, _checker, _memory = Parser(ask.VersionBody), Parser(ask.CheckerBody), Parser(ask.MemoryBody)
_rpc = Parser(ask.RpcBody)
_selecting, _end, _post = Parser(ask.SelectingBody), Parser(ask.UpdateBody), Parser(ask.PostProcessBody)
_SAID: dict[str, Any] = {"answer": ask.UpdateAnswer, "errors": NEEDS_ENGINE}
_DONE: dict[str, Any] = {"answer": ControlAnswer, "errors": NEEDS_ENGINE}


def _failed(reply: ControlReply) -> Response:
    """In the shape of every error, and in the one that trainers read."""
    error = Error(message=reply.message, type="invalid_request_error", code="refused")
    return json_response({"success": False, "message": reply.message, "error": error}, 400)


async def _call(request: Request, call: str, /, **args: Any) -> Response:
    reply = await door_of(request).client.control(call, SECONDS, **args)
    return json_response(ControlAnswer(success=True, message=reply.message or "done")) if reply.ok else _failed(reply)


async def _update(request: Request, name: str, args: dict[str, Any]) -> Response:
    client = door_of(request).client
    reply = await client.control(name, SECONDS, **args)
    if not reply.ok:
        return _failed(reply)
    return json_response(
        ask.UpdateAnswer(
            success=True,
            message=reply.message,
            weight_version=client.weight_version,
            num_tensors=reply.data.get("tensors", 0),
            num_aborted_requests=reply.data.get("aborted", 0),
        )
    )


@router.post("/update_weights_from_tensor", **describe(body=ask.FromTensorBody, **_SAID))
async def update_weights_from_tensor(
    request: Request,
    flush_cache: Annotated[bool, Query(description="For a body of safetensors.")] = True,
    abort_all_requests: Annotated[bool, Query(description="For a body of safetensors.")] = False,
    weight_version: Annotated[str | None, Query(max_length=1000, description="For a body of safetensors.")] = None,
) -> Response:
    """New values for some weights or all. Everything is checked before anything is written; 400 tells what is wrong.

    A body of type `application/octet-stream` is safetensors as it is, with the other fields in the query.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == RAW:
        given = {"flush": flush_cache, "abort_all": abort_all_requests, "version": weight_version}
        parts = [part async for part in request.stream()]
        return await _blobs(request, [b"".join(parts)], {"load_format": "safetensors", **given})
    body = await door_of(request).read(request, _tensor)
    texts = ask.needed(body.serialized_named_tensors, "serialized_named_tensors")
    blobs = await decoded(texts, "serialized_named_tensors")
    return await _blobs(request, blobs, {"load_format": body.load_format, **body.common()})


async def _blobs(request: Request, blobs: list[bytes], args: dict[str, Any]) -> Response:
    async with on_their_way(blobs) as sent:
        return await _update(request, "update_weights", {"source": "blobs", **sent, **args})


@router.post("/update_weights_from_disk", **describe(body=ask.FromDiskBody, **_SAID))
async def update_weights_from_disk(request: Request) -> Response:
    """The weights of another checkpoint of the same model, read beside running steps."""
    return await _update(request, "update_weights", ask.disk(await door_of(request).read(request, _disk)))


@router.post("/init_weights_update_group", **describe(body=ask.InitGroupBody, **_DONE))
async def init_weights_update_group(request: Request) -> Response:
    """Join a trainer's group of torch.distributed."""
    return await _call(request, "init_group", **ask.group(await door_of(request).read(request, _group)))


@router.post("/destroy_weights_update_group", **describe(body=ask.DestroyGroupBody, body_required=False, **_DONE))
async def destroy_weights_update_group(request: Request) -> Response:
    """Leave a group."""
    body = await door_of(request).read(request, _destroy, empty=b"{}")
    return await _call(request, "destroy_group", name=body.group_name or ask.GROUP)


@router.post("/update_weights_from_distributed", **describe(body=ask.FromDistributedBody, **_SAID))
async def update_weights_from_distributed(request: Request) -> Response:
    """Receive weights from rank 0 of a group; nothing is written before all of them are there."""
    body = await door_of(request).read(request, _distributed)
    return await _update(request, "update_weights", ask.distributed(body))


@router.post("/update_weights_from_ipc", **describe(body=ask.FromIpcBody, **_SAID))
async def update_weights_from_ipc(request: Request) -> Response:
    """Receive weights in buckets of memory that a sender on this machine lends (checkpoint-engine); nothing is written
    before all of them are there."""
    return await _update(request, "update_weights", ask.ipc(await door_of(request).read(request, _ipc)))


@router.post("/collective_rpc", **describe(body=ask.RpcBody, **_SAID))
async def collective_rpc(request: Request) -> Response:
    """The same, as checkpoint-engine's own examples ask for it."""
    return await _update(request, "update_weights", ask.rpc(await door_of(request).read(request, _rpc)))


@router.post("/begin_weight_update", **describe(body=ask.SelectingBody, body_required=False, **_DONE))
async def begin_weight_update(request: Request) -> Response:
    """Collect what comes, in any number of calls, until the update ends: it serves whole or not at all."""
    await door_of(request).read(request, _selecting, empty=b"{}")
    return await _call(request, "begin_update")


@router.post("/end_weight_update", **describe(body=ask.UpdateBody, body_required=False, **_SAID))
async def end_weight_update(request: Request) -> Response:
    """Put in place what was collected."""
    return await _update(request, "end_update", (await door_of(request).read(request, _end, empty=b"{}")).common())


@router.post("/abort_weight_update", **describe(body=ask.SelectingBody, body_required=False, **_DONE))
async def abort_weight_update(request: Request) -> Response:
    """Forget what was collected, as of a trainer that is gone; the weights stay what they are."""
    await door_of(request).read(request, _selecting, empty=b"{}")
    return await _call(request, "abort_update")


@router.post("/post_process_weights", **describe(body=ask.PostProcessBody, body_required=False, **_DONE))
async def post_process_weights(request: Request) -> Response:
    """Nothing is left to do behind an update."""
    await door_of(request).read(request, _post, empty=b"{}")
    return json_response(ControlAnswer(success=True, message="weights are ready when an update is answered"))


@router.post("/update_weight_version", **describe(body=ask.VersionBody, **_SAID))
async def update_weight_version(request: Request) -> Response:
    """Name the weights anew. Aborts all requests unless `abort_all_requests` is false."""
    body = await door_of(request).read(request, _version)
    version = ask.needed(body.new_version, "new_version")
    args = {"version": version, "abort_all": body.abort_all_requests is not False}
    return await _update(request, "update_version", args)


@router.get("/weight_version", **describe(answer=ask.VersionAnswer))
@router.get("/get_weight_version", **describe(answer=ask.VersionAnswer))
async def get_weight_version(request: Request) -> Response:
    """What the weights are called."""
    version = door_of(request).client.weight_version
    return json_response(ask.VersionAnswer(success=True, message=version, weight_version=version))


@router.post("/weights_checker", **describe(body=ask.CheckerBody, answer=ask.ChecksumAnswer, errors=NEEDS_ENGINE))
async def weights_checker(request: Request) -> Response:
    """Digests of all tensors; whether they are those that they were; or random values in their place."""
    door = door_of(request)
    body = await door.read(request, _checker)
    args = {"action": ask.needed(body.action, "action"), "skip": body.skip_tensor_list}
    reply = await door.client.control("check_weights", SECONDS, **args)
    if not reply.ok:
        return _failed(reply)
    found = reply.data.get("checksums", {})
    return json_response(ask.ChecksumAnswer(success=True, message=reply.message, checksums=found))


@router.post("/release_memory_occupation", **describe(body=ask.MemoryBody, body_required=False, **_DONE))
async def release_memory_occupation(request: Request) -> Response:
    """Give memory back to the system; requests wait until it is resumed. Refused while requests run."""
    body = await door_of(request).read(request, _memory, empty=b"{}")
    return await _call(request, "release_memory", tags=body.tags)


@router.post("/resume_memory_occupation", **describe(body=ask.MemoryBody, body_required=False, **_DONE))
async def resume_memory_occupation(request: Request) -> Response:
    """Take it again, with the weights that were there."""
    body = await door_of(request).read(request, _memory, empty=b"{}")
    return await _call(request, "resume_memory", tags=body.tags)
