"""Collectives of processes on one machine through memory that they share: a call costs microseconds.

Each rank has two places in turn and a counter. It writes its part, counts on, waits until all have counted as far, and
reads the others' parts. Who writes a place again has seen all ranks at the call in between, and so behind their reading
of it: one meeting a call is enough. Sums go over the ranks in their order, so that all have the same bits. Those of
float32 are a native op, where it is built, which recorded steps hold (csrc/cpu/each/meeting.cpp, of the same layout).

What is written is seen in the order of writing on x86 alone; elsewhere the ranks meet by gloo.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.core.errors import EngineDead
from phloem.distributed.comm import CPU, StepUndone, counts_of
from phloem.kernels.native_meeting import SharedSum

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from phloem.distributed.comm import Comm, Undoing
    from phloem.kernels.native_meeting import Spent

PLACE = 4 << 20  # bytes of a rank's part in one go; what is larger goes in pieces
LINE = 64  # bytes between two counters: no two ranks write one cache line
SPINS, YIELDS = 300, 3000  # looks before the core is given to others, and before it is left for a while
NAP = 50e-6  # seconds


class SharedMemory:
    """One rank's end (`distributed.comm.Comm`).

    Args:
        place: a file that rank 0 makes and the others find, in a folder of this group alone. Once all have it open its
            name is not needed any more.
        timeout: seconds that a rank waits for the others.
    """

    name, device = "shm", CPU

    def __init__(self, rank: int, size: int, place: Path, timeout: float) -> None:
        self.rank, self.size, self._timeout = rank, size, timeout
        head = LINE * (size + 1)
        whole = head + 2 * size * PLACE
        until = time.monotonic() + timeout
        if rank == 0:
            # Under another name until it has its size.
            early = place.with_suffix(".new")
            with early.open("wb") as file:
                file.truncate(whole)
            early.rename(place)
        while not place.exists():
            if time.monotonic() > until:
                raise EngineDead(f"rank {rank} did not find the memory of the others")
            time.sleep(0.005)
        descriptor = os.open(place, os.O_RDWR)
        try:
            self._memory = mmap.mmap(descriptor, whole)
        finally:
            os.close(descriptor)
        counters = np.frombuffer(self._memory, np.int64, count=head // 8)
        self._counters = [counters[LINE // 8 * (other + 1) :][:1] for other in range(size)]
        self._ended, self._undone = counters[:1], counters[1:2]
        self._known = 0  # undone steps
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, offset=head)
        self._places = [[flat[(turn * size + r) * PLACE :][:PLACE] for r in range(size)] for turn in (0, 1)]
        lines = torch.frombuffer(self._memory, dtype=torch.int64, count=head // 8)
        self._sum = SharedSum.of(lines, flat.view(torch.float32), rank, size, PLACE // 4, timeout)
        self._meet()

    @property
    def host(self) -> Comm:
        return self

    @property
    def records(self) -> bool:
        return self._sum is not None

    @property
    def spent(self) -> Spent | None:
        """Of sums, recorded ones too; None: they are not counted."""
        return None if self._sum is None else self._sum.spent

    def check(self) -> None:
        failed = 0 if self._sum is None else self._sum.failed
        if failed < 0:
            raise StepUndone("another rank found no memory")
        if failed == 1:
            raise EngineDead(f"rank {self.rank}: the group was ended")
        if failed:
            raise EngineDead(f"rank {failed - 2} did not come within {self._timeout:g} s")

    @property
    def undoing(self) -> Undoing:
        return self

    @property
    def count(self) -> int:
        """As `Undoing`; so are the next two."""
        return int(self._undone[0])

    def undo(self) -> None:
        self._undone[0] = max(self.count, self._known + 1)  # several may say so of one step

    def resume(self, count: int) -> None:
        if count <= self._known:
            return
        self._known = count
        if self._sum is not None:
            self._sum.resume(count)
        # Beyond all that was counted before, of which ranks may have done more or less. Nobody writes a place before
        # all have met: one of them may still read it.
        self._counters[self.rank][0] = count << 32
        self._meet()

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._sum is not None and x.dtype == torch.float32:
            found = self._sum(x)
            if not self._sum.recording:
                self.check()
            return found
        total = torch.empty(x.numel(), dtype=torch.float32)
        flat = x.reshape(-1)
        for first in range(0, len(flat), PLACE // 4):
            piece = flat[first : first + PLACE // 4]
            places = [place.view(torch.float32)[: len(piece)] for place in self._next()]
            places[self.rank].copy_(piece)
            self._meet()
            into = total[first : first + len(piece)]
            torch.add(places[0], places[1], out=into)
            for place in places[2:]:
                into.add_(place)
        return total.view(x.shape).to(x.dtype)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        for span, places in self._pieces(x, writes=True):
            for mine, place in zip(found, places, strict=True):
                _bytes(mine)[span].copy_(place)
        return found

    def gather(self, x: Tensor) -> list[Tensor] | None:
        if self.rank == 0:
            return self.all_gather(x)
        for _ in self._pieces(x, writes=True):
            pass
        return None

    def all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        """Each rank reads its own rows alone."""
        counts, whole = counts_of(self, parts), torch.cat(parts)
        found = [whole.new_empty((row[self.rank], *whole.shape[1:])) for row in counts]
        data, each = _bytes(whole), whole[:1].nbytes or int(np.prod(whole.shape[1:])) * whole.element_size()
        starts = [sum(row[: self.rank]) * each for row in counts]
        for first in range(0, max(sum(row) for row in counts) * each, PLACE):
            places = self._next()
            piece = data[first : first + PLACE]
            places[self.rank][: len(piece)].copy_(piece)
            self._meet()
            for into, start, place in zip(found, starts, places, strict=True):
                low, high = max(start, first), min(start + into.nbytes, first + PLACE)
                if low < high:
                    _bytes(into)[low - start : high - start].copy_(place[low - first : high - first])
        return found

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        for span, places in self._pieces(x, writes=self.rank == 0):
            if self.rank:
                _bytes(x)[span].copy_(places[0])
        return x

    def abort(self) -> None:
        self._ended[0] = 1

    def _pieces(self, x: Tensor, *, writes: bool) -> Iterator[tuple[slice, list[Tensor]]]:
        """Where each piece of x lies among its bytes, and every rank's, once all have met."""
        data = _bytes(x.contiguous())
        for first in range(0, len(data), PLACE):
            span = slice(first, min(len(data), first + PLACE))
            places = [place[: span.stop - first] for place in self._next()]
            if writes:
                places[self.rank].copy_(data[span])
            self._meet()
            yield span, places

    def _next(self) -> list[Tensor]:
        """The places of the call that comes."""
        return self._places[(int(self._counters[self.rank][0]) + 1) & 1]

    def _go_on(self) -> None:
        """Raises where nobody must be waited for."""
        if self._ended[0]:
            raise EngineDead(f"rank {self.rank}: the group was ended")
        if self._undone[0] > self._known:
            raise StepUndone("another rank found no memory")

    def _meet(self) -> None:
        self._go_on()
        call = int(self._counters[self.rank][0]) + 1
        self._counters[self.rank][0] = call
        for other, counter in enumerate(self._counters):
            looks, until = 0, 0.0
            while counter[0] < call:
                looks += 1
                if looks < SPINS:
                    continue
                if looks < YIELDS:
                    os.sched_yield()
                else:
                    time.sleep(NAP)
                until = until or time.monotonic() + self._timeout
                self._go_on()
                if time.monotonic() > until:
                    raise EngineDead(f"rank {other} did not come within {self._timeout:g} s")
        self._go_on()


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
