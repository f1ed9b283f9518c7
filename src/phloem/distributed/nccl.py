"""Collectives of ranks that have a graphics card each, by NCCL, over torch.distributed.

A call is put on the card's current stream and the host goes on: what comes behind it on that stream waits for it. So a
step graph captures it as it captures kernels, and a replay repeats it. What is asked of it in a step has sizes that all
ranks know: nothing is read back, but by `all_to_all`, whose counts must be known on the host.

It has only met a stand-in of torch's group: no door opens it yet, since ranks run on the processor.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from phloem.core.errors import EngineDead
from phloem.distributed.comm import counts_of

if TYPE_CHECKING:
    from torch import Tensor

_TORCH: Any = dist  # typed only in part


class Nccl:
    """One rank's end (`distributed.comm.Comm`).

    Args:
        store: what all ranks reach, of torch.distributed.
        device: this rank's card.
        timeout: seconds that the ranks may take to find each other, and torch's own limit of a call.
        kind: torch's class; another one stands in for it in tests.
    """

    name = "nccl"
    records = True  # a graph captures calls
    undoing = None

    def __init__(
        self, rank: int, size: int, store: Any, device: torch.device, timeout: float, kind: Any = None
    ) -> None:
        self.rank, self.size = rank, size
        kind = _TORCH.ProcessGroupNCCL if kind is None else kind
        self._aborted = False
        try:
            options = kind.Options()
            options._timeout = timedelta(seconds=timeout)
            self._group = kind(store, rank, size, options)
            # The first call makes the connections, which no graph may capture, and shows who is missing.
            self._group.allreduce([torch.zeros(1, device=device)]).wait()
        except RuntimeError as error:
            raise EngineDead(f"the ranks did not find each other: {str(error).splitlines()[0]:.200}") from None

    def _run(self, call: Any, *arguments: Any) -> None:
        self.check()
        try:
            call(*arguments).wait()  # on the stream; the host goes on
        except RuntimeError as error:
            self.check()
            raise EngineDead(f"rank {self.rank} lost the others: {str(error).splitlines()[0]:.200}") from None

    def all_reduce(self, x: Tensor) -> Tensor:
        """In the type of `x`: a card adds as it receives."""
        total = x.clone(memory_format=torch.contiguous_format)
        if total.numel():
            self._run(self._group.allreduce, [total])
        return total

    def all_gather(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        found = x.new_empty((self.size, *x.shape))
        if x.numel():
            self._run(self._group._allgather_base, found, x)
        return list(found.unbind(0))

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """By all of them: a graph has no host that would tell one rank from the others."""
        found = self.all_gather(x)
        return found if self.rank == 0 else None

    def all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        counts = counts_of(self, parts)
        mine = [row[self.rank] for row in counts]
        x = torch.cat(parts)
        found = x.new_empty((sum(mine), *x.shape[1:]))
        if any(map(sum, counts)):
            self._run(self._group.alltoall_base, found, x, mine, counts[self.rank], _TORCH.AllToAllOptions())
        return list(found.split(mine))

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.numel():
            options = _TORCH.BroadcastOptions()
            options.rootRank = 0
            self._run(self._group.broadcast, [x], options)
        return x

    def check(self) -> None:
        if self._aborted:
            raise EngineDead(f"rank {self.rank}: the group was ended")

    def abort(self) -> None:
        """What waits on a card is let go with its communicator."""
        self._aborted = True
        self._group.abort()
