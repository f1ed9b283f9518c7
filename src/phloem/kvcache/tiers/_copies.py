"""Pages of the pool as rows of bytes, whatever their layout: group behind group, layer behind layer, each tensor's page
as it lies there.

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
    """`pages`: int32 [groups of pages, n], or [n] where there is one group; row i has those of column i."""

    page_bytes: int
    state_bytes: int  # of a state; 0: there are none

    def state_out(self, slot: int, rows: Sequence[Row]) -> None:
        """A state to rows, each of which is full but the last."""
        ...

    def state_into(self, rows: Sequence[Row], slot: int) -> None: ...

    def out(self, pages: NDArray[np.int32], rows: Sequence[Row]) -> None:
        """Pages of the pool to rows."""
        ...

    def into(self, rows: Sequence[Row], pages: NDArray[np.int32]) -> None:
        """Rows to pages of the pool; what a group's page is 0 for is left out."""
        ...


class PoolCopies:
    """Of the groups of a pool that have pages."""

    def __init__(self, pool: KVPool) -> None:
        # For each group: tensors as [pages, words of a page], and their bytes in a row.
        self._groups: list[list[tuple[Tensor, int, int]]] = []
        start = 0
        for number, group in enumerate(pool.groups):
            if group.kind != "pages":
                continue
            parts: list[tuple[Tensor, int, int]] = []
            for tensor in pool.stored(number):
                count = tensor[0].nbytes
                parts.append((_words(tensor, count), start, start + count))
                start += count
            self._groups.append(parts)
        self.page_bytes = start
        states = [number for number, group in enumerate(pool.groups) if group.kind == "state"]
        # Of each state the tensors that it lies in, as [slots, words of a slot].
        self._states = [_words(tensor, tensor[0].nbytes) for number in states for tensor in pool.stored(number)]
        self.state_bytes = sum(words[0].nbytes for words in self._states)
        self._device = pool.device
        self._on_host = in_host_memory(pool.device)
        # Addresses, for there are some dozen parts of a page: a view of each would cost more than its copy.
        self._places = [[(words.data_ptr(), start, end - start) for words, start, end in parts]
                        for parts in self._groups]  # fmt: skip

    def out(self, pages: NDArray[np.int32], rows: Sequence[Row]) -> None:
        for number, mine in enumerate(np.atleast_2d(pages).astype(np.int64)):
            if self._on_host:
                for row, page in zip(rows, mine.tolist(), strict=True):
                    place = row.ctypes.data
                    for address, start, count in self._places[number]:
                        memmove(place + start, address + page * count, count)
                continue
            parts = self._groups[number]
            first, last = parts[0][1], parts[-1][2]
            for begin in range(0, len(mine), PART):
                index = torch.from_numpy(mine[begin : begin + PART]).to(self._device)
                whole = torch.cat([words.index_select(0, index).view(torch.uint8) for words, _, _ in parts], 1)
                for row, found in zip(rows[begin:], whole.cpu().numpy(), strict=False):
                    row[first:last] = found

    def into(self, rows: Sequence[Row], pages: NDArray[np.int32]) -> None:
        for number, mine in enumerate(np.atleast_2d(pages).astype(np.int64)):
            at = np.flatnonzero(mine)
            if self._on_host:
                for column in at.tolist():
                    place, page = rows[column].ctypes.data, int(mine[column])
                    for address, start, count in self._places[number]:
                        memmove(address + page * count, place + start, count)
                continue
            parts = self._groups[number]
            first, last = parts[0][1], parts[-1][2]
            for begin in range(0, len(at), PART):
                some = at[begin : begin + PART]
                index = torch.from_numpy(mine[some]).to(self._device)
                whole = torch.from_numpy(np.stack([rows[column][first:last] for column in some.tolist()]))
                whole = whole.to(self._device)
                for words, start, end in parts:
                    part = whole[:, start - first : end - first].contiguous()
                    words.index_copy_(0, index, part.view(words.dtype))

    def state_out(self, slot: int, rows: Sequence[Row]) -> None:
        whole = torch.cat([words[slot].view(torch.uint8) for words in self._states]).cpu().numpy()
        size = len(rows[0])
        for at, row in enumerate(rows):
            part = whole[at * size : (at + 1) * size]
            row[: len(part)] = part

    def state_into(self, rows: Sequence[Row], slot: int) -> None:
        whole = torch.from_numpy(np.concatenate(rows)).to(self._device)
        at = 0
        for words in self._states:
            count = words[slot].nbytes
            words[slot].copy_(whole[at : at + count].clone().view(words.dtype))
            at += count


def _words(tensor: Tensor, page_bytes: int) -> Tensor:
    """The tensor as [pages, words], of 8 bytes where a page has whole ones."""
    flat = tensor.view(len(tensor), -1).view(torch.uint8)
    return flat.view(torch.int64) if page_bytes % 8 == 0 else flat
