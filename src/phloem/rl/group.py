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
TIMEOUT = 300.0  # seconds for the rendezvous, and for each tensor
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
        self._worker = ThreadPoolExecutor(1, f"phloem-group-{name[:20]}")
        self._address, self._world, self._backend = address, world, backend

    def join(self) -> Future[None]:
        return self._worker.submit(self._join)

    def receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]], bucket: bool) -> Future[Tensors]:
        return self._worker.submit(self._receive, names, dtypes, shapes, bucket)

    def leave(self) -> None:
        """What is under way ends as it would; nothing more is received. Call it once."""
        self.broken = self.broken or "the group was destroyed"
        self._worker.submit(self._close)
        self._worker.shutdown(wait=False)

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
        if self.broken or self._made is None:
            raise BadRequest(f"group {self.name}: {self.broken or 'nobody has joined'}; destroy it and begin anew")
        types = [dtype_of(name) for name in dtypes]
        if bucket:
            places, end = list[dict[str, Any]](), 0
            for name, shape, dtype in zip(names, shapes, types, strict=True):
                start, end = end, end + _bytes(shape, dtype)
                places.append({"name": name, "shape": shape, "dtype": dtype, "start_idx": start, "end_idx": end})
            flat = torch.empty(end, dtype=torch.uint8, device=self._device)
            self._broadcast([flat])
            return flattened(flat, places)
        values = [
            torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in zip(shapes, types, strict=True)
        ]
        self._broadcast(values)
        return list(zip(names, values, strict=True))

    def _broadcast(self, values: Sequence[torch.Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = ROOT, 0, self._timeout
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
