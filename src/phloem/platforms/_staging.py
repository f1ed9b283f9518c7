"""Weights from files to the device: several readers, pinned buffers, and copies beside the computation.

Each reader takes a piece of a tensor from the file into a free pinned buffer and gives the copy to a stream of its own;
it waits only for the copy that used the buffer before. The types are changed on the device. Files give contiguous
pieces by large reads, which a disk serves best, and shares of rows through the page cache.
"""

from __future__ import annotations

import os
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

PIECE = 16 << 20  # bytes
READERS = 8

Index = tuple[int | slice, ...]


@dataclass(slots=True)
class _Buffer:
    bytes: Tensor
    used: Any = None  # event after the last copy out of it


@dataclass(frozen=True, slots=True)
class _Piece:
    """`[start, stop)` of the result's elements: bytes of the file at `at`, or the entries of a mapped view."""

    start: int
    stop: int
    at: int = 0
    view: NDArray[Any] | None = None


class Stager:
    """Reads tensors of files onto a device. Used by one thread; `close` ends the readers.

    `cuda` is torch.cuda, or what stands in for it in a test.
    """

    def __init__(
        self,
        device: torch.device,
        cuda: Any = torch.cuda,
        *,
        pin: bool = True,
        readers: int = READERS,
        piece: int = PIECE,
    ) -> None:
        self.device = device
        self._cuda = cuda
        self._piece = piece
        self._copy = cuda.Stream(device)
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(2 * readers):
            self._free.put(_Buffer(torch.empty(piece, dtype=torch.uint8, pin_memory=pin)))
        self._readers = ThreadPoolExecutor(readers, "phloem-read")

    def load(
        self, path: Path, offset: int, shape: tuple[int, ...], stored: torch.dtype, index: Index | None, to: torch.dtype
    ) -> Tensor:
        """The entries `index` (None: all) of the tensor that begins at byte `offset` of the file, contiguous, of type
        `to`, on the device; whoever uses it on the current stream waits for nothing.

        Raises:
            OSError: if the file cannot be read, or is too short.
        """
        whole = tuple(slice(0, size, 1) for size in shape) if index is None else index
        found, pieces = self._pieces(path, offset, shape, stored.itemsize, whole)
        out = torch.empty(found, dtype=to, device=self.device)
        # Its memory may have been another tensor's, which the current stream still reads.
        self._copy.wait_stream(self._cuda.current_stream(self.device))
        file = os.open(path, os.O_RDONLY)
        try:
            flat = out.view(-1)
            list(self._readers.map(lambda piece: self._move(file, piece, stored, flat), pieces))
        finally:
            os.close(file)
        self._cuda.current_stream(self.device).wait_stream(self._copy)
        return out

    def close(self) -> None:
        """End the readers, after their copies."""
        self._readers.shutdown()
        while not self._free.empty():
            buffer = self._free.get()
            if buffer.used is not None:
                buffer.used.synchronize()

    def _pieces(
        self, path: Path, offset: int, shape: tuple[int, ...], size: int, index: Index
    ) -> tuple[tuple[int, ...], Iterator[_Piece]]:
        """The shape of the result, and its pieces, each no larger than a buffer."""
        run = _run(shape, index)
        if run is not None:
            found, first = run
            total, most = prod(found), self._piece // size
            starts = range(0, total, most)
            return found, (_Piece(at, min(total, at + most), offset + (first + at) * size) for at in starts)
        mapped = np.memmap(path, f"u{size}", "r", offset, shape)[index]
        return mapped.shape, self._cut(mapped, size, 0)

    def _cut(self, view: NDArray[Any], size: int, start: int) -> Iterator[_Piece]:
        if view.size * size <= self._piece:
            yield _Piece(start, start + view.size, view=view)
            return
        row = view[0].size
        if row * size > self._piece:
            for number, one in enumerate(view):
                yield from self._cut(one, size, start + number * row)
            return
        most = self._piece // (row * size)
        for at in range(0, len(view), most):
            part = view[at : at + most]
            yield _Piece(start + at * row, start + at * row + part.size, view=part)

    def _move(self, file: int, piece: _Piece, stored: torch.dtype, flat: Tensor) -> None:
        buffer = self._free.get()
        try:
            if buffer.used is not None:
                buffer.used.synchronize()
            size = (piece.stop - piece.start) * stored.itemsize
            host = buffer.bytes[:size]
            _read(file, piece, host.numpy())
            with self._cuda.stream(self._copy):
                here = host.view(stored)
                target = flat[piece.start : piece.stop]
                if stored != target.dtype:
                    here = here.to(self.device, non_blocking=True)
                target.copy_(here, non_blocking=True)
                buffer.used = self._cuda.Event()
                buffer.used.record(self._copy)
        finally:
            self._free.put(buffer)


def _run(shape: tuple[int, ...], index: Index) -> tuple[tuple[int, ...], int] | None:
    """(Shape, first element) of what lies in one run in the file; None: it does not."""
    found: list[int] = []
    first, width, ended = 0, prod(shape), False
    for size, at in zip(shape, index, strict=True):
        width //= max(size, 1)
        begin, end, step = (at, at + 1, 1) if isinstance(at, int) else (at.start, at.stop, at.step)
        if ended and (begin, end) != (0, size):
            return None
        if step != 1 and end - begin > 1:
            return None
        # Behind an axis of which several entries are taken, but not an axis of one, all others must be whole.
        ended = ended or end - begin > 1
        first += begin * width
        if not isinstance(at, int):
            found.append(end - begin)
    return tuple(found), first


def _read(file: int, piece: _Piece, into: NDArray[Any]) -> None:
    if piece.view is not None:
        np.copyto(into.view(piece.view.dtype).reshape(piece.view.shape), piece.view)
        return
    done = 0
    while done < len(into):
        got = os.preadv(file, [into[done:].data], piece.at + done)
        if got == 0:
            raise OSError("the file is too short")
        done += got
