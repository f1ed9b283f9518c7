"""What the scheduler asks of weights: new ones read and made ready beside the steps, put in place between two of them,
their memory given back and taken again (`core.updates.Keeper`)."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from threading import Event
from time import perf_counter, sleep
from typing import IO, TYPE_CHECKING, Any

import torch

from phloem.checkpoint.describe import describe
from phloem.core import updates
from phloem.core.errors import BadRequest, PhloemError
from phloem.models._foreign_tower import ForeignTower, load_tower
from phloem.models._push import Push
from phloem.platforms import _lent
from phloem.platforms._facts import in_host_memory
from phloem.rl import ipc
from phloem.rl._shared import device_handle
from phloem.rl.group import TIMEOUT, Group, backend_for
from phloem.rl.payload import check_format, dtype_of, flattened, named_tensors
from phloem.rl.sleep import discard, restore, save, state_of
from phloem.utils import log, memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.batch import Pending
    from phloem.engine.runner import ModelRunner
    from phloem.models._common import Decoder
    from phloem.rl._records import Made
    from phloem.rl.payload import Tensors

_log = log.get("rl")

SLICE = 0.01  # seconds between two steps that new weights are made ready for
DISK_FORMATS = ("auto", "safetensors", "gguf", "dummy")
SLACK = 64 << 20  # bytes of a payload beyond twice what the weights take in float32


class Reading:
    """New weights on their way (`core.batch.Pending`): read in a thread, then made ready in slices between steps.

    `between` None: they are only collected.
    """

    def __init__(self, push: Push, coming: Future[Any], between: Callable[[Callable[[], bool]], Pending[bool]] | None):
        self._push, self._coming, self._between = push, coming, between
        self._slice: Pending[bool] | None = None
        self._ended = False
        self._error: Exception | None = None

    def done(self) -> bool:
        if not self._ended:
            try:
                self._ended = self._advance()
            except Exception as error:
                self._ended, self._error = True, error
        return self._ended

    def _advance(self) -> bool:
        if not self._coming.done():
            return False
        self._coming.result()
        if self._between is None:
            return True
        if self._slice is not None:
            if not self._slice.done():
                return False
            if self._slice.result():
                return True
        self._slice = self._between(lambda: self._push.prepare(perf_counter() + SLICE))
        return False

    def result(self) -> int:
        while not self.done():
            sleep(0.001)
        if self._error is not None and self._between is not None:
            self._push.clear()  # as large as the model, perhaps
        if isinstance(self._error, PhloemError):
            raise BadRequest(self._error.message, param=self._error.param)
        if self._error is not None:
            _log.error("new weights could not be read", exc_info=self._error)
            raise BadRequest(f"{type(self._error).__name__}: {str(self._error)[:300]}")
        return len(self._push.names)


class Keeper(updates.Keeper):
    """Args:
    version: what the user calls the weights that are there.
    backup: whether weights are copied to disk before their memory is given back.
    """

    def __init__(self, runner: ModelRunner, model: Decoder, checkpoint: Checkpoint, version: str, backup: bool) -> None:
        self.version, self.epoch, self.unfit, self.asleep = version, 0, "", frozenset[str]()
        self.nameless = ""
        self._runner, self._index, self._rename = runner, model.index, model.checkpoint_name
        self._settle = model.settle
        self._tower = model.tower if isinstance(model.tower, ForeignTower) else None
        self._tower_read: ForeignTower | None = None  # which the update brings
        self._backup, self._model_type = backup, checkpoint.model_type
        self._origin: tuple[Checkpoint, Any] | None = (checkpoint, state_of(checkpoint))  # what is in memory, on disk
        self._read: tuple[Checkpoint, Any] | None = None  # whose whole the update brings
        self._ready: Push | None = None
        self._collected: Push | None = None
        self._lost_before: set[str] = set()  # of the index, when memory was given back
        self._saved: IO[bytes] | None = None
        self._groups: dict[str, Group] = {}
        self._worker, self._stopped = ThreadPoolExecutor(1, "phloem-weights"), Event()
        elements = sum(prod(self._index.stored_shape(name)) for name in self._index.names())
        self._limit = 8 * elements + SLACK

    # updates

    @property
    def collecting(self) -> bool:
        return self._collected is not None

    def begin(self) -> None:
        if self._collected is not None:
            raise BadRequest("an update has begun already: end it, or abort_weight_update if whoever began it is gone")
        self._collected, self._read = self._push(), None

    def drop(self) -> int:
        if self._collected is None:
            raise BadRequest("no update has begun")
        dropped, self._collected = self._collected, None
        return len(dropped.names)

    def end(self) -> Reading:
        if self._collected is None:
            raise BadRequest("no update has begun")
        self._check_awake()
        self._ready, self._collected = self._collected, None
        coming: Future[None] = Future()
        coming.set_result(None)
        return Reading(self._ready, coming, self._runner.between)

    def read(self, source: str, args: dict[str, Any]) -> Reading:
        try:
            self._check_awake()
            push = self._push() if self._collected is None else self._collected
            coming = self._coming(source, args, push)
        except PhloemError as error:
            if source == "group" and (group := self._groups.get(str(args["group"]))) is not None:
                raise BadRequest(f"{error.message}; {self._pass_over(group, args)}", param=error.param) from None
            raise
        if self._collected is not None:
            return Reading(push, coming, None)
        self._ready = push
        return Reading(push, coming, self._runner.between)

    def _push(self) -> Push:
        self._tower_read = None
        return Push(self._index, self._rename, None if self._tower is None else self._tower.owns)

    def _check_awake(self) -> None:
        if "weights" in self.asleep:
            raise BadRequest("the weights' memory is given back: resume_memory_occupation first")

    def _coming(self, source: str, args: dict[str, Any], push: Push) -> Future[Any]:
        self._read = None
        submit = self._worker.submit
        if source == "tensors":
            return submit(push.add, self._own(args["tensors"], args.get("load_format")))
        if source == "blobs":
            load_format = args.get("load_format")
            check_format(load_format)
            files = [Path(path) for path in args.get("files") or ()]
            return submit(
                lambda: push.add(
                    named_tensors(
                        [*(args.get("blobs") or ()), *(path.read_bytes() for path in files)],
                        load_format,
                        self._limit,
                        None if in_host_memory(self._index.ctx.device) else self._on_device,
                    )
                )
            )
        if source == "ipc":
            address = ipc.address_for(dict(args.get("handles") or {}), self._index.ctx.device)
            return submit(lambda: push.add(self._in_buckets(address), sound=True))
        if source == "random":
            shapes = {name: self._index.stored_shape(name) for name in self._index.names()}
            return submit(lambda: push.add(((name, torch.randn(shape)) for name, shape in shapes.items()), sound=True))
        if source == "group":
            self._group(str(args["group"]))
            shapes, dtypes = self._shapes(args), [dtype_of(name) for name in args["dtypes"]]
            push.expect(zip(args["names"], dtypes, shapes, strict=True))  # now: what is broadcast tells no more of it
            received = self.receive(args)
            return submit(lambda: push.add(received.result()))
        path, load_format = str(args["path"]), str(args.get("load_format") or "auto")
        if load_format not in DISK_FORMATS:
            raise BadRequest(
                f"load_format {load_format!r:.200} is not one of {', '.join(DISK_FORMATS)}", param="load_format"
            )
        if not os.path.exists(path):
            raise BadRequest(f"model_path: there is no {path!r:.300} on the engine's machine", param="model_path")
        return submit(self._from_disk, push, path, load_format)

    def receive(self, args: dict[str, Any]) -> Future[Tensors]:
        group = self._group(str(args["group"]))
        try:
            shapes = self._shapes(args)
        except BadRequest as error:
            raise BadRequest(f"{error.message}; {self._pass_over(group, args)}", param=error.param) from None
        return group.receive(args["names"], args["dtypes"], shapes, args.get("load_format") == "flattened_bucket")

    def _pass_over(self, group: Group, args: dict[str, Any]) -> str:
        """What becomes of what was announced with a call that is refused."""
        try:
            shapes = self._shapes(args)
        except BadRequest:
            return group.end("what was announced is not received, so that nothing behind it is known")
        return group.pass_over(args["dtypes"], shapes, args.get("load_format") == "flattened_bucket", self._limit)

    def _on_device(self, record: Made) -> torch.Tensor:
        return _lent.copied(device_handle(record), self._index.ctx.device)

    def _in_buckets(self, address: str) -> Tensors:
        """Bucket by bucket, each checked as it comes, so that the sender is told."""
        seen = Push(self._index, self._rename, None if self._tower is None else self._tower.owns)
        return ipc.receive(address, self._index.ctx.device, seen.add, self._limit, self._stopped)

    def _own(self, tensors: Any, load_format: str | None) -> list[tuple[str, torch.Tensor]]:
        """Tensors that were handed over in this process; copies, where they are kept for longer."""
        if load_format == "flattened_bucket":
            places = [{name: getattr(one, name) for name in _PLACE} for one in tensors["metadata"]]
            tensors = flattened(tensors["flattened_tensor"].cpu(), places)
        else:
            check_format(load_format)
        pairs = list(tensors.items()) if isinstance(tensors, dict) else tensors
        pairs = list(pairs) if isinstance(pairs, Iterable) else [pairs]
        if not all(_is_named(pair) for pair in pairs):
            raise BadRequest("named_tensors: a list of (name, tensor) is needed", param="named_tensors")
        return [(name, tensor.detach().clone() if self.collecting else tensor.detach()) for name, tensor in pairs]

    def _shapes(self, args: dict[str, Any]) -> list[list[int]]:
        names, shapes = args["names"], args["shapes"]
        if not len(names) == len(args["dtypes"]) == len(shapes):
            raise BadRequest("names, dtypes and shapes are not as many", param="names")
        total = sum(prod(shape) for shape in shapes)
        if any(size < 0 for shape in shapes for size in shape) or 4 * total > self._limit:
            raise BadRequest("the tensors are larger than this model's weights may be", param="shapes")
        return shapes

    def _from_disk(self, push: Push, path: str, load_format: str) -> None:
        found = describe(path, load_format)
        if found.model_type != self._model_type:
            raise BadRequest(
                f"{path} is a {found.model_type}, this engine serves a {self._model_type}", param="model_path"
            )
        state = state_of(found)  # before it is read: who writes meanwhile is noticed
        push.add_checkpoint(found)
        push.look()
        if self._tower is not None and load_format != "dummy":
            if found.seen is None:
                raise BadRequest(f"{path} has no tower of {self._tower.name}", param="model_path")
            self._tower_read = load_tower(found, found.seen, self._index.ctx, self._tower.hidden_size)
        self._read = found, state

    def put(self) -> None:
        push = self._ready
        assert push is not None
        if push.install():
            self._runner.drop_graphs()
        if self._tower is not None and self._tower_read is not None:
            self._tower.take(self._tower_read)
            self._tower_read = None
        self._settle()
        self._runner.forget_pictures()

    def changed(self, version: str | None, error: Exception | None = None) -> None:
        push, self._ready = self._ready, None
        self.epoch += 1
        self.nameless = secrets.token_hex(8) if version is None else ""
        if error is not None:
            self.unfit = f"an update ended half done ({type(error).__name__}: {error}): send a whole one"
            self._index.lost = set(self._index.names())
            return
        assert push is not None
        self.version = self.version if version is None else str(version)  # callers in Python count steps
        if push.names:
            self._origin = self._read
        self._index.lost -= push.names
        if self.unfit and not self._index.lost:
            self.unfit = ""

    # groups

    def join(self, args: dict[str, Any]) -> Future[None]:
        name = str(args["name"])
        if name in self._groups:
            raise BadRequest(f"there is a group {name!r:.100}: destroy it first", param="group_name")
        rank, world = int(args["rank"]), int(args["world"])
        if not 0 < rank < world:
            raise BadRequest(f"rank {rank} of {world}: the trainer is 0, engines follow", param="rank_offset")
        backend = backend_for(str(args["backend"] or ""), host=in_host_memory(self._index.ctx.device))
        timeout = float(args.get("timeout") or TIMEOUT)
        device = self._index.ctx.device
        group = Group(name, str(args["address"]), rank, world, backend, timeout, device)
        self._groups[name] = group
        joined = group.join()

        def ended(done: Future[None]) -> None:
            # Another group may have that name by now.
            if done.exception() is not None and self._groups.get(name) is group:
                del self._groups[name]

        joined.add_done_callback(ended)
        return joined

    def leave(self, name: str) -> None:
        self._group(name).leave()
        del self._groups[name]

    def _group(self, name: str) -> Group:
        group = self._groups.get(name)
        if group is None:
            known = ", ".join(self._groups) or "none"
            raise BadRequest(f"there is no group {name!r:.100}; known: {known}", param="group_name")
        return group

    def digests(self, skip: list[str]) -> dict[str, str]:
        self._check_awake()
        found: dict[str, str] = {}
        for name in self._index.names():
            if not any(part in name for part in skip):
                values = self._index.get(name).cpu().contiguous().view(-1).view(torch.uint8)
                found[name] = hashlib.sha256(values.numpy().data).hexdigest()
        return found

    # sleep

    def release(self, tags: frozenset[str]) -> int:
        if not in_host_memory(self._index.ctx.device):
            raise BadRequest("memory is given back on the host alone", param="tags")
        if self._index.ctx.ops.compiler is not None:
            raise BadRequest("memory that compiled steps take (jax, tpu) is not given back", param="tags")
        done, new = 0, tags - self.asleep
        if "cuda_graph" in new:
            done += self._runner.graph_bytes
            self._runner.drop_graphs()
        if "kv_cache" in new:
            done += self._runner.pool.discard()
        if "weights" in new:
            done += self._release_weights()
        self.asleep |= new
        memory.trim()
        return done

    def _release_weights(self) -> int:
        if self._backup:
            try:
                self._saved = save(self._index)
            except OSError as error:
                raise BadRequest(f"the weights could not be copied to disk, and stay: {error}") from None
        self._lost_before, self._index.lost = self._index.lost, set(self._index.names())
        return discard(self._index)

    def resume(self, tags: frozenset[str]) -> None:
        if "weights" in tags & self.asleep:
            self._resume_weights()
        self.asleep -= tags

    def _resume_weights(self) -> None:
        saved, self._saved = self._saved, None
        why = "they were not copied before (--enable-weights-cpu-backup), and are not those of a checkpoint any more"
        try:
            if saved is not None:
                restore(self._index, saved)
                self._index.lost = self._lost_before
                return
            if self._origin is not None:
                checkpoint, state = self._origin
                if state_of(checkpoint) == state:
                    again = Push(self._index, self._rename)
                    again.add_checkpoint(_afresh(checkpoint))
                    again.stream()
                    self._index.lost, self.unfit = set(), ""
                    return
                why = f"the files of {checkpoint.path} have changed"
        except (OSError, PhloemError) as error:
            why = str(error)
        self.unfit = f"the weights' memory was given back, and {why}: send new ones"

    def close(self) -> None:
        self._stopped.set()
        self._worker.shutdown(wait=False, cancel_futures=True)
        for group in self._groups.values():
            group.leave()


_PLACE = ("name", "shape", "dtype", "start_idx", "end_idx")


def _is_named(pair: Any) -> bool:
    return (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], torch.Tensor)
    )


def _afresh(checkpoint: Checkpoint) -> Checkpoint:
    """A GGUF file whose memory has been given back is opened again."""
    if checkpoint.gguf is None:
        return checkpoint
    return describe(str(checkpoint.path), "gguf")
