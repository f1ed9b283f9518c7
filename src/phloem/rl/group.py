"""A group of processes in which a trainer broadcasts weights: apart from torch's default group, left by name.

On the host by gloo. On a device by the backend that its tensors travel by (NCCL on GPUs), or by gloo through the host.

The trainer's rank 0 sends; this engine has one of the other ranks. It is joined as torch joins a group of its own: a
store at the trainer's address, the group's name as prefix.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from phloem.core.errors import BadRequest
from phloem.platforms._facts import in_host_memory
from phloem.rl.payload import Tensors, dtype_of, flattened

if TYPE_CHECKING:
    from collections.abc import Sequence

c10d: Any = dist.distributed_c10d  # how a group beside the default one is made is a private part of torch
TIMEOUT = 300.0  # seconds for the rendezvous, and for each tensor, unless its caller says how many
PATIENCE = 10.0  # seconds, for each tensor of a call that was refused: it is on its way, or will never come
ROOT = 0
HOST_BACKEND, DEVICE_BACKEND = "gloo", "nccl"
MOST_NAMES = 1 << 20


def backend_for(asked: str, *, host: bool) -> str:
    """What tensors travel by. `host`: whether this engine computes on the host.

    Raises:
        BadRequest: this engine, or this torch, has no such backend.
    """
    found = asked or (HOST_BACKEND if host else DEVICE_BACKEND)
    if host and found != HOST_BACKEND:
        raise BadRequest(f"backend {found!r:.50}: this engine runs on the host, use gloo", param="backend")
    if not dist.is_backend_available(found):
        raise BadRequest(f"backend {found!r:.50}: this torch is built without it, use gloo", param="backend")
    return found


class Group:
    """One group. Its calls run in a thread of its own, one after another; each gives a future.

    `device`: where tensors are received, unless they travel by gloo.
    """

    def __init__(
        self,
        name: str,
        address: str,
        rank: int,
        world: int,
        backend: str,
        timeout: float = TIMEOUT,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.broken = name, ""
        self._device = torch.device("cpu") if backend == HOST_BACKEND or device is None else device
        self._rank, self._timeout = rank, timedelta(seconds=timeout)
        self._made: Any = None
        self._refused: Future[None] = Future()  # what was announced with the last call that was refused has come
        self._refused.set_result(None)
        self._worker = ThreadPoolExecutor(1, f"phloem-group-{name[:20]}")
        self._address, self._world, self._backend = address, world, backend

    def join(self) -> Future[None]:
        return self._worker.submit(self._join)

    def receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]], bucket: bool) -> Future[Tensors]:
        if not self._refused.done():  # what comes now may be that or this
            self.broken = self.broken or "what a refused call announced was not broadcast before the next call"
        return self._worker.submit(self._receive, names, dtypes, shapes, bucket)

    def leave(self) -> None:
        """What is under way ends as it would; nothing more is received. Call it once."""
        self.broken = self.broken or "the group was destroyed"
        self._worker.submit(self._close)
        self._worker.shutdown(wait=False)

    def pass_over(self, dtypes: list[str], shapes: list[list[int]], bucket: bool, most: int) -> str:
        """Receive what was announced with a call that was refused, and forget it, so that the trainer's broadcasts end
        and its next ones are taken for what they are. `most`: bytes that a tensor may have. Gives what becomes of it,
        as a sentence."""
        if self.broken:
            return f"the group cannot be used: {self.broken}; destroy it and begin anew"
        try:
            types = [dtype_of(name) for name in dtypes]
        except BadRequest:
            return self.end("what was announced cannot be received, so that nothing behind it is known")
        told = [(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]
        if bucket:
            told = [([sum(_bytes(shape, dtype) for shape, dtype in told)], torch.uint8)]
        self._refused = self._worker.submit(self._pass_over, told, most)
        return "what is broadcast for it is received and forgotten, and the group stays"

    def end(self, why: str) -> str:
        """Say that it cannot be used any more, and close it, so that a broadcast of the trainer fails at once."""
        self.broken = self.broken or why
        self._worker.submit(self._close)
        return f"the group cannot be used any more: {why}; destroy it and begin anew"

    def _pass_over(self, told: list[tuple[list[int], torch.dtype]], most: int) -> None:
        # A trainer that was refused may send nothing of this, but what it announces next. Gloo ends the process where
        # more comes than there is room for; who hands on to further ranks hands on all of its room.
        room = most if self._world == 2 and in_host_memory(self._device) else 0
        try:
            for shape, dtype in told:
                self._check()
                size = max(_bytes(shape, dtype), room)
                value = torch.empty(size, dtype=torch.uint8) if room else self._empty(shape, dtype)
                self._broadcast([value], min(self._timeout, timedelta(seconds=PATIENCE)))
        except Exception as error:
            self.broken = self.broken or f"{type(error).__name__}: {error}"
            self.broken = f"what a refused call announced did not come whole: {self.broken}"
            self._close()

    def _check(self) -> None:
        """Raises BadRequest: nothing can be received."""
        if self.broken or self._made is None:
            raise BadRequest(f"group {self.name}: {self.broken or 'nobody has joined'}; destroy it and begin anew")

    def _empty(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Where a tensor is received. By gloo a shorter one leaves what was there before: NaN, which is refused."""
        if not in_host_memory(self._device):
            return torch.empty(shape, dtype=dtype, device=self._device)
        return torch.full((_bytes(shape, dtype),), 0xFF, dtype=torch.uint8).view(dtype).view(shape)

    def _close(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            dist.destroy_process_group(made)

    def _join(self) -> None:
        try:
            found = c10d.rendezvous(self._address, rank=self._rank, world_size=self._world, timeout=self._timeout)
            store, rank, world = next(found)
            store.set_timeout(self._timeout)
            made, _ = c10d._new_process_group_helper(
                world, rank, [], self._backend, c10d.PrefixStore(self.name, store), group_name=self.name,
                timeout=self._timeout,
            )  # fmt: skip
        except Exception as error:
            self.broken = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            raise BadRequest(f"group {self.name}: the rendezvous failed: {self.broken}") from None
        c10d._world.pg_group_ranks[made] = {i: i for i in range(world)}
        self._made = made

    def _receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]], bucket: bool) -> Tensors:
        self._check()
        types = [dtype_of(name) for name in dtypes]
        if bucket:
            places, end = list[dict[str, Any]](), 0
            for name, shape, dtype in zip(names, shapes, types, strict=True):
                start, end = end, end + _bytes(shape, dtype)
                places.append({"name": name, "shape": shape, "dtype": dtype, "start_idx": start, "end_idx": end})
            flat = self._empty([end], torch.uint8)
            self._broadcast([flat])
            return flattened(flat, places)
        values = [self._empty(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]
        self._broadcast(values)
        return list(zip(names, values, strict=True))

    def _broadcast(self, values: Sequence[torch.Tensor], timeout: timedelta | None = None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = ROOT, 0, timeout or self._timeout
        try:
            for value in values:
                self._made.broadcast([value], options).wait()
            if not in_host_memory(self._device):
                torch.accelerator.synchronize(self._device)  # `wait` has only put the copy before what comes behind it
        except Exception as error:
            # Who has sent what is not known any more: the next broadcast could be read as another one.
            self.broken = f"a broadcast failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            raise BadRequest(f"group {self.name}: {self.broken[:300]}; nothing was changed") from None


def _bytes(shape: list[int], dtype: torch.dtype) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
