"""A group of processes in which a trainer broadcasts weights: apart from torch's default group, left by name.

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
from phloem.rl.payload import Tensors, dtype_of, flattened

if TYPE_CHECKING:
    from collections.abc import Sequence

c10d: Any = dist.distributed_c10d  # how a group beside the default one is made is a private part of torch
TIMEOUT = 300.0  # seconds for the rendezvous, and for each tensor
ROOT = 0
MOST_NAMES = 1 << 20


class Group:
    """One group. Its calls run in a thread of its own, one after another; each gives a future."""

    def __init__(self, name: str, address: str, rank: int, world: int, backend: str, timeout: float = TIMEOUT) -> None:
        self.name, self.broken = name, ""
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
            flat = torch.empty(end, dtype=torch.uint8)
            self._broadcast([flat])
            return flattened(flat, places)
        values = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True)]
        self._broadcast(values)
        return list(zip(names, values, strict=True))

    def _broadcast(self, values: Sequence[torch.Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = ROOT, 0, self._timeout
        try:
            for value in values:
                self._made.broadcast([value], options).wait()
        except Exception as error:
            # Who has sent what is not known any more: the next broadcast could be read as another one.
            self.broken = f"a broadcast failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            raise BadRequest(f"group {self.name}: {self.broken[:300]}; nothing was changed") from None


def _bytes(shape: list[int], dtype: torch.dtype) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
