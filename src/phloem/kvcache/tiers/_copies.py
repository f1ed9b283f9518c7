"""Pages of the pool as rows of bytes, whatever their layout: layer behind layer, each tensor's page as it lies there.

For the thread that runs the steps, between two of them (`core.batch.Runner.between`): what was launched before has
then written its pages, and what is launched later has not.
"""

from __future__ import annotations

from ctypes import memmove
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from phloem.platforms._facts import in_host_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.kvcache.pool import KVPool
    from phloem.kvcache.tiers import Row

PART = 64  # pages that are copied at once: of more, the rows would take as much memory again


class Copies(Protocol):
    page_bytes: int

    def out(self, pages: NDArray[np.int32], rows: Sequence[Row]) -> None:
        """Pages of the pool to rows."""
        ...

    def into(self, rows: Sequence[Row], pages: NDArray[np.int32]) -> None:
        """Rows to pages of the pool."""
        ...


class PoolCopies:
    """Of a pool whose layers are one group."""

    def __init__(self, pool: KVPool) -> None:
        parts: list[tuple[Tensor, int, int]] = []  # a tensor as [pages, words of a page], and its bytes in a row
        start = 0
        for tensor in pool.stored(0):
            count = tensor[0].nbytes
            parts.append((_words(tensor, count), start, start + count))
            start += count
        self._parts, self.page_bytes = parts, start
        self._on_host = in_host_memory(pool.device)
        # Addresses, for there are some dozen parts of a page: a view of each would cost more than its copy.
        self._places = [(words.data_ptr(), start, end - start) for words, start, end in parts]

    def out(self, pages: NDArray[np.int32], rows: Sequence[Row]) -> None:
        for begin in range(0, len(pages), PART):
            at = pages[begin : begin + PART].astype(np.int64)
            if self._on_host:
                for place, page in enumerate(at.tolist(), begin):
                    row = rows[place].ctypes.data
                    for address, start, count in self._places:
                        memmove(row + start, address + page * count, count)
                continue
            index = torch.from_numpy(at).to(self._parts[0][0].device)
            whole = torch.cat([words.index_select(0, index).view(torch.uint8) for words, _, _ in self._parts], 1)
            for row, found in zip(rows[begin:], whole.cpu().numpy(), strict=False):
                row[: self.page_bytes] = found

    def into(self, rows: Sequence[Row], pages: NDArray[np.int32]) -> None:
        for begin in range(0, len(pages), PART):
            at = pages[begin : begin + PART].astype(np.int64)
            if self._on_host:
                for place, page in enumerate(at.tolist(), begin):
                    row = rows[place].ctypes.data
                    for address, start, count in self._places:
                        memmove(address + page * count, row + start, count)
                continue
            device = self._parts[0][0].device
            index = torch.from_numpy(at).to(device)
            whole = torch.from_numpy(np.stack([row[: self.page_bytes] for row in rows[begin : begin + PART]]))
            whole = whole.to(device)
            for words, start, end in self._parts:
                words.index_copy_(0, index, whole[:, start:end].contiguous().view(words.dtype))


def _words(tensor: Tensor, page_bytes: int) -> Tensor:
    """The tensor as [pages, words], of 8 bytes where a page has whole ones."""
    flat = tensor.view(len(tensor), -1).view(torch.uint8)
    return flat.view(torch.int64) if page_bytes % 8 == 0 else flat
