"""How much of each page's tokens the model that drafts has computed, as far as this is known.

Whatever writes a page's position for the model anew makes the drafting model's part of it old, from there on. So a
page may change its owner, be shared, or be written again after drafts were refused: what is left is computed when
somebody drafts there next.

Legend: P pages of a row's table, S page size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Marks:
    """By page: of how many of its first positions there is what the drafting model keeps."""

    def __init__(self, pages: int, page_size: int) -> None:
        self._filled = np.zeros(pages, np.int32)
        self._size = page_size

    def forget(self) -> None:
        """Nothing is known any more."""
        self._filled[:] = 0

    def written(self, table: NDArray[np.int32], starts: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
        """The model has written `counts` positions of each row from `starts` on; `table` [R, P]."""
        first, offset = np.divmod(starts, np.int32(self._size))
        pages = table[np.arange(len(starts)), first]
        np.minimum.at(self._filled, pages, offset)
        last = (starts + counts - 1) // self._size
        for row in np.flatnonzero(last > first).tolist():
            self._filled[table[row, first[row] + 1 : last[row] + 1]] = 0

    def known(self, row: NDArray[np.int32], most: int) -> int:
        """How many of the first `most` positions of a row [P] are there without a gap."""
        count = -(-most // self._size)
        filled = self._filled[row[:count]]
        gap = np.flatnonzero(filled < self._size)
        if not len(gap):
            return most
        at = int(gap[0])
        return min(most, at * self._size + int(filled[at]))

    def computed(self, row: NDArray[np.int32], start: int, end: int) -> None:
        """The drafting model has computed the positions [start, end) of a row, all before them being there."""
        if end <= start:
            return
        first, last = start // self._size, (end - 1) // self._size
        self._filled[row[first:last]] = self._size
        self._filled[row[last]] = max(int(self._filled[row[last]]), end - last * self._size)
