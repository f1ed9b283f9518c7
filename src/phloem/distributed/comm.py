"""Collectives: what the ranks of one axis say to each other inside a step. Every rank calls them in the same order.

Members: `Threads` (all ranks in one process, for tests), `Gloo` (processes, over torch.distributed). Sums are taken in
float32 whatever the type, and every rank gets the same bits: each goes on from its own copy.
"""

from __future__ import annotations

import ctypes
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import distributed as dist

from phloem.core.errors import EngineDead
from phloem.utils.sockets import descriptors, notice_cuts

if TYPE_CHECKING:
    from torch import Tensor


_TORCH: Any = dist  # typed only in part
CPU = torch.device("cpu")


class Board:
    """Where ranks of several machines leave their addresses for each other, for the time of a start.

    Args:
        host, port: where one rank holds it.
        listening: that rank's socket, bound there and listening; None: another rank has it.
        timeout: seconds that a rank waits for it, and for what others leave there.
    """

    def __init__(self, host: str, port: int, timeout: float, listening: socket.socket | None = None) -> None:
        hand = {} if listening is None else {"master_listen_fd": listening.detach()}
        wait = timedelta(seconds=timeout)
        try:
            self._store = _TORCH.TCPStore(host, port, None, listening is not None, wait, wait_for_workers=False, **hand)
        except RuntimeError as error:
            raise EngineDead(f"{host}:{port}: {str(error).splitlines()[0]:.200}") from None

    def part(self, name: str) -> Any:
        """The part of one group of ranks."""
        return _TORCH.PrefixStore(name, self._store)


class StepUndone(MemoryError):
    """Another rank found no memory for a part of the step: all of them leave it."""


class Undoing(Protocol):
    """How all ranks of a group leave a step together, and begin anew."""

    @property
    def count(self) -> int:
        """Steps that were undone, as the ranks have said so far."""
        ...

    def undo(self) -> None:
        """Whoever waits for others in the step, or would, raises `StepUndone`."""
        ...

    def resume(self, count: int) -> None:
        """Meet anew behind so many undone steps, where this rank has not; all of them call it."""
        ...


class Comm(Protocol):
    """One rank's end of a group of ranks.

    Every call raises `EngineDead` when another rank has gone or does not come within the group's time.
    """

    name: str
    rank: int
    size: int
    device: torch.device  # where tensors lie that ranks give each other

    @property
    def host(self) -> Comm:
        """The same ranks' group for values that the host has: numbers, sizes, words."""
        ...

    @property
    def records(self) -> bool:
        """Whether float32 sums are calls that a step's recording holds; `check` then says whether they failed."""
        ...

    @property
    def undoing(self) -> Undoing | None:
        """None: who has failed within a step cannot go on."""
        ...

    def check(self) -> None:
        """Raises `EngineDead`, or `StepUndone`, where a call of a recorded step did not find the others."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in the type of `x`; `x` may be used up."""
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """What every rank has, in their order; the shapes are the same."""
        ...

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """As `all_gather`, for rank 0; None for the others."""
        ...

    def all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        """`parts[r]` goes to rank r, which has what each rank gave it, in their order. Parts are alike but for how
        many rows they have, which may be none."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """What rank 0 has; the others bring a tensor of that shape and type, which may be overwritten."""
        ...

    def abort(self) -> None:
        """Let no rank wait any longer, now and later. From any thread."""
        ...


def counts_of(comm: Comm, parts: list[Tensor]) -> list[list[int]]:
    """[from][to] rows of what all ranks give each other."""
    return [row.tolist() for row in comm.host.all_gather(torch.tensor([len(part) for part in parts]))]


class _Meeting:
    """Where the threads of one group put what they have. Two places in turn: who writes the third call's has seen all
    ranks at the second, and so behind their reading of the first."""

    def __init__(self, size: int, timeout: float) -> None:
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.places: list[list[Tensor | None]] = [[None] * size, [None] * size]


class Threads:
    """A rank in a thread of this process. `Threads.group(n)` makes all of them."""

    name, device = "threads", CPU
    records, undoing = False, None

    def __init__(self, meeting: _Meeting, rank: int, size: int) -> None:
        self._meeting, self.rank, self.size = meeting, rank, size
        self._turn = 0

    @staticmethod
    def group(size: int, timeout: float = 60.0) -> list[Threads]:
        """The ends of `size` ranks, one for each thread."""
        meeting = _Meeting(size, timeout)
        return [Threads(meeting, rank, size) for rank in range(size)]

    @property
    def host(self) -> Comm:
        return self

    def _meet(self, x: Tensor | None) -> list[Tensor | None]:
        places = self._meeting.places[self._turn]
        self._turn ^= 1
        places[self.rank] = x
        try:
            self._meeting.barrier.wait()
        except threading.BrokenBarrierError:
            raise EngineDead("a rank has gone, or did not come in time") from None
        return list(places)

    def all_reduce(self, x: Tensor) -> Tensor:
        parts = [part for part in self._meet(x) if part is not None]
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        # A sum over one rank alone would be that rank's own tensor.
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [part for part in self._meet(x) if part is not None]

    def gather(self, x: Tensor) -> list[Tensor] | None:
        found = self.all_gather(x)
        return found if self.rank == 0 else None

    def all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        counts = counts_of(self, parts)
        given = self.all_gather(torch.cat(parts))
        return [x.split(row)[self.rank] for x, row in zip(given, counts, strict=True)]

    def broadcast(self, x: Tensor) -> Tensor:
        found = self._meet(x)[0]
        assert found is not None
        return found

    def check(self) -> None:
        """Each call has said what became of it."""

    def abort(self) -> None:
        self._meeting.barrier.abort()


_LOOK = timedelta(seconds=0.25)  # of one wait for the others


class Gloo:
    """A rank that is a process, over torch.distributed's gloo. It finds the others by a store of torch.distributed.

    The group is its own: a process may have several engines, and the caller's own torch.distributed is left alone.

    Args:
        place: a file that does not exist yet, in a folder of this group alone; or a store that all ranks reach.
        timeout: seconds that a rank waits for the others; one whose link is cut is found within seconds.
        host: this machine's address, at which the others reach it.
    """

    name, device = "gloo", CPU
    records, undoing = False, None

    def __init__(self, rank: int, size: int, place: Path | Any, timeout: float, host: str = "127.0.0.1") -> None:
        self.rank, self.size = rank, size
        kind = _TORCH.ProcessGroupGloo
        try:
            options = kind._Options()
            options._timeout = timedelta(seconds=timeout)
            options._devices = [kind.create_device(hostname=host)]
            options._threads = 1
            store = _TORCH.FileStore(str(place), size) if isinstance(place, Path) else place
            before = descriptors()
            self._group = kind(store, rank, size, options)
            # The first rank removes the folder once it has joined: by then all must have read the file to its end.
            self._group.barrier().wait()
            notice_cuts(descriptors() - before)  # a step may take minutes, but no link is silent for so long
        except RuntimeError as error:
            raise EngineDead(f"the ranks did not find each other: {error}") from None
        self._aborted = False

    @property
    def host(self) -> Comm:
        return self

    def _run(self, work: dist.Work) -> None:
        # In short waits: gloo lets nobody go who waits for a process that is stopped, whatever is aborted.
        while not self._aborted:
            try:
                work.wait(_LOOK)
                break
            except RuntimeError as error:
                if work.is_completed():
                    first = str(error).splitlines()[0]
                    raise EngineDead(f"rank {self.rank} lost the others: {first:.200}") from None
        if self._aborted:
            if not work.is_completed():
                # Its thread may wait for minutes yet, and the group's end, at the latest that of Python, for it.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
            raise EngineDead(f"rank {self.rank}: the group was ended")

    def all_reduce(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        total = x.to(torch.float32, copy=x.dtype == torch.float32).contiguous()
        self._run(self._group.allreduce([total]))
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        if not x.numel():
            return [x] * self.size
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)]
        self._run(self._group.allgather([found], [x]))
        return found

    def gather(self, x: Tensor) -> list[Tensor] | None:
        if not x.numel():
            return [x] * self.size if self.rank == 0 else None
        x = x.contiguous()
        options = dist.GatherOptions()
        options.rootRank = 0
        found = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self._run(self._group.gather([found] if self.rank == 0 else [], [x], options))
        return found if self.rank == 0 else None

    def all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        counts = counts_of(self, parts)
        mine = [row[self.rank] for row in counts]
        if not any(map(sum, counts)):
            return list(parts)
        x = torch.cat(parts)
        found = x.new_empty((sum(mine), *x.shape[1:]))
        self._run(self._group.alltoall_base(found, x, mine, counts[self.rank], dist.AllToAllOptions()))
        return list(found.split(mine))

    def broadcast(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        x = x.contiguous()
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._run(self._group.broadcast([x], options))
        return x

    def check(self) -> None:
        """Each call has said what became of it."""

    def abort(self) -> None:
        self._aborted = True
        self._group.abort()
