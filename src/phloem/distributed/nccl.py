"""Collectives of ranks that have a graphics card each, by NCCL (RCCL on AMD's), over torch.distributed.

A call is put on the card's current stream and the host goes on: what comes behind it on that stream waits for it. So a
step graph captures it as it captures kernels, and a replay repeats it. What is asked of it in a step has sizes that all
ranks know: nothing is read back. What hosts must know of each other (`host`) goes by memory that they share, or gloo.

Sums are taken in the tensor's own type, in an order that NCCL chooses; its algorithms make each number once and hand it
on, so that all ranks have the same bits.

It has only met a stand-in of torch's group, never a card.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from phloem.core.config import let_ranks_end
from phloem.core.errors import EngineDead
from phloem.distributed.comm import counts_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.distributed.comm import Comm

_TORCH: Any = dist  # typed only in part


class Nccl:
    """One rank's end (`distributed.comm.Comm`).

    Args:
        store: a store of torch.distributed that all ranks reach, or a file that does not exist yet.
        device: this rank's card.
        timeout: seconds that the ranks may take to find each other, and torch's own limit of a call.
        host: the same ranks' group on the host.
        kind: torch's class; another one stands in for it in tests.
    """

    name = "nccl"
    records = True  # a graph captures calls
    undoing = None

    def __init__(
        self, rank: int, size: int, store: Any, device: torch.device, timeout: float, host: Comm, kind: Any = None
    ) -> None:
        self.rank, self.size, self.device, self.host = rank, size, device, host
        let_ranks_end()
        self._aborted = False
        try:
            kind = _TORCH.ProcessGroupNCCL if kind is None else kind
            options = kind.Options()
            options._timeout = timedelta(seconds=timeout)
            store = _TORCH.FileStore(str(store), size) if isinstance(store, Path) else store
            self._group = kind(store, rank, size, options)
            # The first call makes the connections, which no graph may capture. Its value is waited for: the ranks'
            # files may go then, and the next group's first call cannot come beside this one.
            met = torch.ones(1, device=device)
            self._run(self._group.allreduce, [met], self._now(_TORCH.AllreduceOptions()))
            if float(met) != size:
                raise RuntimeError(f"{float(met):g} of {size} have come")
        except (RuntimeError, AttributeError) as error:  # the latter: this torch is built without NCCL
            raise EngineDead(f"the ranks did not find each other: {str(error).splitlines()[0]:.200}") from None

    @staticmethod
    def _now(options: Any) -> Any:
        """On the current stream, and not on one of the group's, which would wait for it and be waited for."""
        options.asyncOp = False
        return options

    def _run(self, call: Any, *arguments: Any) -> None:
        self.check()
        try:
            work = call(*arguments)
            if work is not None:  # a group that has streams of its own all the same
                work.wait()  # the current stream; the host goes on
        except RuntimeError as error:
            self.check()
            raise EngineDead(f"rank {self.rank} lost the others: {str(error).splitlines()[0]:.200}") from None

    def all_reduce(self, x: Tensor) -> Tensor:
        """In the type of `x`, and in its place: a card adds as it receives."""
        total = x.contiguous()
        if total.numel():
            self._run(self._group.allreduce, [total], self._now(_TORCH.AllreduceOptions()))
        return total

    def all_gather(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        found = x.new_empty((self.size, *x.shape))
        if x.numel():
            self._run(self._group._allgather_base, found, x, self._now(_TORCH.distributed_c10d.AllgatherOptions()))
        return list(found.unbind(0))

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """By all of them: a graph has no host that would tell one rank from the others."""
        found = self.all_gather(x)
        return found if self.rank == 0 else None

    def all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        """How many rows go where is said on the host."""
        counts = counts_of(self, parts)
        mine = [row[self.rank] for row in counts]
        x = torch.cat(parts)
        found = x.new_empty((sum(mine), *x.shape[1:]))
        if any(map(sum, counts)):
            options = self._now(_TORCH.AllToAllOptions())
            self._run(self._group.alltoall_base, found, x, mine, counts[self.rank], options)
        return list(found.split(mine))

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.numel():
            options = self._now(_TORCH.BroadcastOptions())
            options.rootRank = 0
            self._run(self._group.broadcast, [x], options)
        return x

    def check(self) -> None:
        if self._aborted:
            raise EngineDead(f"rank {self.rank}: the group was ended")

    def abort(self) -> None:
        """What waits on a card is let go with its communicator, and gives nothing that counts: `check` says so first.

        In a thread of its own: the call returns no sooner than every graph that holds calls of the group has gone.
        """
        self._aborted = True
        self.host.abort()
        threading.Thread(target=self._group.abort, name="phloem-abort", daemon=True).start()
