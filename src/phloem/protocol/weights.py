"""Bodies of the calls that change weights and give memory back, and what the engine is asked for by them.

`Engine` asks through the same functions.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from msgspec import Meta, field

from phloem.core.errors import BadRequest
from phloem.protocol.answers import ControlAnswer
from phloem.protocol.body import Later
from phloem.protocol.fields import AddressedBody

GROUP = "weight_update_group"
_NO_DRAFTS = Later("draft_weights", (False, "target", "all"), "drafts have no weights of their own here")
_CACHE = "memory is given back when a step needs it"
Size = Annotated[int, Meta(ge=0, le=1 << 48)]
Name = Annotated[str, Meta(max_length=1000)]


class SelectingBody(AddressedBody, kw_only=True):
    """Base: `selector` names the target, its drafts, or all."""

    selector: str | None = None
    disable_draft_model: bool | None = None
    torch_empty_cache: bool | None = None

    ignored: ClassVar[dict[str, str]] = {
        **AddressedBody.ignored,
        "disable_draft_model": "drafts have no weights of their own here",
        "torch_empty_cache": _CACHE,
    }
    later: ClassVar[dict[str, Later]] = {"selector": _NO_DRAFTS}


class UpdateBody(SelectingBody, kw_only=True):
    """Base of updates. `flush_cache` (default true) frees what is cached of the old weights where nothing runs; it is
    never found either way. `weight_version`: what the new weights are called."""

    flush_cache: bool | None = None
    weight_version: Name | None = None
    abort_all_requests: bool | None = None

    def common(self) -> dict[str, Any]:
        return {
            "version": self.weight_version,
            "flush": self.flush_cache is not False,
            "abort_all": bool(self.abort_all_requests),
        }


class FromTensorBody(UpdateBody, kw_only=True):
    """`POST /update_weights_from_tensor`. Base64 of safetensors (`load_format` safetensors: any number of them), or of
    what torch pickles of shared tensors (one for each rank)."""

    serialized_named_tensors: list[str] | None = None
    load_format: str | None = None


class FromDiskBody(UpdateBody, kw_only=True):
    """`POST /update_weights_from_disk`. `model_path`: a whole checkpoint on the server's machine."""

    model_path: Annotated[str, Meta(max_length=4096)] | None = None
    load_format: str | None = None
    is_async: bool | None = None
    keep_pause: bool | None = None
    recapture: bool | None = field(default=None, name="recapture_cuda_graph")
    token_step: int | None = None
    manifest: Any = None

    ignored: ClassVar[dict[str, str]] = {
        **UpdateBody.ignored,
        "is_async": "files are always read beside running steps",
        "keep_pause": "an update leaves a pause as it is",
        "recapture": "recorded steps are made anew where weights moved",
        "token_step": "the version is what names weights",
    }
    later: ClassVar[dict[str, Later]] = {**UpdateBody.later, "manifest": Later("delta_checkpoints")}


class InitGroupBody(AddressedBody, kw_only=True):
    """`POST /init_weights_update_group`: join the group in which the trainer, rank 0, broadcasts. Answers when all of
    it are there. `timeout`: seconds for that, and for each tensor that is announced later; default 300."""

    master_address: Name | None = None
    master_port: int | str | None = None
    rank_offset: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    world_size: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    group_name: Name | None = None
    backend: Name | None = None
    pp_rank: int | None = None
    timeout: Annotated[float, Meta(gt=0, le=3600)] | None = None

    ignored: ClassVar[dict[str, str]] = {**AddressedBody.ignored, "pp_rank": "one rank serves the whole model"}


class DestroyGroupBody(AddressedBody, kw_only=True):
    """`POST /destroy_weights_update_group`."""

    group_name: Name | None = None


class FromDistributedBody(UpdateBody, kw_only=True):
    """`POST /update_weights_from_distributed`: what is about to be broadcast, in that order; with `load_format`
    flattened_bucket as one row of bytes."""

    names: list[Name] | None = None
    dtypes: list[Name] | None = None
    shapes: list[Annotated[list[Size], Meta(max_length=8)]] | None = None
    group_name: Name | None = None
    load_format: str | None = None


class FromIpcBody(UpdateBody, kw_only=True):
    """`POST /update_weights_from_ipc`: for each device the socket at which a sender of checkpoint-engine's kind lends
    its memory."""

    zmq_handles: dict[Name, Name] | None = None


class RpcBody(AddressedBody, kw_only=True):
    """`POST /collective_rpc`, as checkpoint-engine asks vLLM: `update_weights_from_ipc` with {device: socket} alone."""

    method: Name | None = None
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    timeout: float | None = None

    ignored: ClassVar[dict[str, str]] = {
        **AddressedBody.ignored,
        "timeout": "the caller stops waiting by itself; an update ends whole or not at all",
    }


class VersionBody(AddressedBody, kw_only=True):
    """`POST /update_weight_version`. `abort_all_requests` is true by default, as callers know it."""

    new_version: Name | None = None
    abort_all_requests: bool | None = None


class PostProcessBody(SelectingBody, kw_only=True):
    """`POST /post_process_weights`: weights are always ready when an update has been answered."""

    restore_weights_before_load: bool | None = None
    post_process_quantization: bool | None = None


class CheckerBody(SelectingBody, kw_only=True):
    """`POST /weights_checker`. `action`: checksum, snapshot, reset (random values) or compare (with the snapshot)."""

    action: str | None = None
    skip_tensor_list: list[Name] | None = None
    allow_quant_error: bool | None = None

    later: ClassVar[dict[str, Later]] = {
        **SelectingBody.later,
        "allow_quant_error": Later("inexact_digests", (False,), "digests are of the bits, and equal or not"),
    }


class MemoryBody(AddressedBody, kw_only=True):
    """Memory to give back, or to take. `tags`: weights, kv_cache, cuda_graph; null: all."""

    tags: list[Name] | None = None


class UpdateAnswer(ControlAnswer, kw_only=True):
    """`version` and how many tensors are new, or collected."""

    weight_version: str = ""
    num_tensors: int = 0
    num_aborted_requests: int = 0
    num_paused_requests: int = 0


class VersionAnswer(ControlAnswer, kw_only=True):
    weight_version: str


class ChecksumAnswer(ControlAnswer, kw_only=True):
    checksums: dict[str, str]


def needed(value: Any, name: str) -> Any:
    """Raises BadRequest for what is not there."""
    if value is None or value == "":
        raise BadRequest(f"{name} is needed", param=name)
    return value


def disk(body: FromDiskBody) -> dict[str, Any]:
    path = needed(body.model_path, "model_path")
    return {"source": "disk", "path": path, "load_format": body.load_format, **body.common()}


def distributed(body: FromDistributedBody) -> dict[str, Any]:
    announced = announcement(body.names, body.dtypes, body.shapes, body.group_name, body.load_format)
    return {"source": "group", **announced, **body.common()}


def announcement(
    names: list[str] | None,
    dtypes: list[str] | None,
    shapes: list[list[int]] | None,
    group_name: str | None,
    load_format: str | None,
) -> dict[str, Any]:
    """What is about to be broadcast in a group. Raises BadRequest: something of it is missing."""
    return {
        "group": group_name or GROUP,
        "names": needed(names, "names"),
        "dtypes": needed(dtypes, "dtypes"),
        "shapes": needed(shapes, "shapes"),
        "load_format": load_format,
    }


def ipc(body: FromIpcBody) -> dict[str, Any]:
    return {"source": "ipc", "handles": needed(body.zmq_handles, "zmq_handles"), **body.common()}


def rpc(body: RpcBody) -> dict[str, Any]:
    """Raises BadRequest: another method, or other arguments."""
    if body.method != "update_weights_from_ipc":
        raise BadRequest(
            f"method {body.method!r:.100}: update_weights_from_ipc alone is called this way", param="method"
        )
    args = body.args or []
    if len(args) != 1 or body.kwargs or not isinstance(args[0], dict):
        raise BadRequest("args: one argument is expected, {device: socket}", param="args")
    if not all(isinstance(one, str) for pair in args[0].items() for one in pair):
        raise BadRequest("args: {device: socket} is of texts", param="args")
    return ipc(FromIpcBody(zmq_handles=args[0]))


def group(body: InitGroupBody) -> dict[str, Any]:
    host, port = needed(body.master_address, "master_address"), needed(body.master_port, "master_port")
    if not str(port).isdigit() or not 0 < int(port) < 65536:
        raise BadRequest(f"master_port {port!r:.50} is no port", param="master_port")
    return {
        "name": body.group_name or GROUP,
        "address": f"tcp://{host}:{port}",
        "rank": needed(body.rank_offset, "rank_offset"),
        "world": needed(body.world_size, "world_size"),
        "backend": body.backend or "",
        "timeout": body.timeout,
    }
