"""Sums over the ranks of one machine as a native op, which recorded steps hold as they hold any other.

The op keeps what it must know from one call to the next in memory: how often this rank has met the others in theirs,
and what has become of its calls in its own. So a replay, which runs no Python, is a call like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from phloem.kernels._native_runtime import Unavailable, runtime

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime

WORK = 1 << 30  # nanoseconds, whoever asks: it waits for others, without the interpreter's lock


class Spent(NamedTuple):
    """Calls so far, seconds of all of them, how many of these were waiting for others, and bytes that were summed."""

    calls: int
    seconds: float
    waited: float
    bytes: int


class SharedSum:
    """One rank's end.

    Args:
        head: int64, a line for the group and one for each rank (`distributed.shm`).
        places: float32, two turns of a place for each rank.
        place: floats of a place.
        patience: seconds that a rank waits for the others.
    """

    def __init__(
        self, rt: Runtime, head: Tensor, places: Tensor, rank: int, size: int, place: int, patience: float
    ) -> None:
        self._rt, self._op = rt, rt.op("shared_sum")
        self._head, self._places, self._told = head, places, torch.zeros(8, dtype=torch.int64)
        self._rank, self._size, self._place, self._patience = rank, size, place, int(patience * 1e9)

    @staticmethod
    def of(head: Tensor, places: Tensor, rank: int, size: int, place: int, patience: float) -> SharedSum | None:
        """None where the native library is missing, or of an older build."""
        try:
            rt = runtime()
        except Unavailable:
            return None
        return SharedSum(rt, head, places, rank, size, place, patience) if rt.has("shared_sum") else None

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over all ranks of float32 `x`, which is not changed. Where it fails (`failed`) it is no sum."""
        x = x.contiguous()
        rows = x.shape[0] if x.dim() > 1 else 1
        n = x.numel() // max(1, rows)
        out = self._rt.empty(x.shape)
        self._rt.call(
            self._op, WORK, head=self._head.data_ptr(), places=self._places.data_ptr(), x=x.data_ptr(),
            out=out.data_ptr(), told=self._told.data_ptr(), rows=rows, n=n, rank=self._rank, size=self._size,
            place=self._place, patience=self._patience,
        )  # fmt: skip
        return out

    @property
    def recording(self) -> bool:
        """Whether calls are being recorded by this thread, and not carried out."""
        return self._rt.recording

    @property
    def failed(self) -> int:
        """0: no call has. -1: the step is undone. 1: the group was ended. 2 + r: rank r did not come in time."""
        return int(self._told[0])

    def resume(self, undone: int) -> None:
        """So many steps were undone: no call has failed since."""
        self._told[0], self._told[5] = 0, undone

    @property
    def spent(self) -> Spent:
        calls, all_of_it, waiting, size = self._told[1:5].tolist()
        return Spent(calls, all_of_it / 1e9, waiting / 1e9, size)
