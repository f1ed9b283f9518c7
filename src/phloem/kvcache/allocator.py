"""Free KV pages on a stack. Page 0 is scratch space of the pool and is never handed out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PageAllocator:
    """Hands out pages 1..num_pages-1 and takes them back; both cost O(1) per page, in batches."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages is {num_pages}: page 0 is scratch, so at least 2 are needed")
        self.num_pages = num_pages
        self._is_free = np.ones(num_pages, dtype=np.bool_)
        self._stack = np.empty(num_pages - 1, dtype=np.int32)
        self._top = 0
        self.reset()

    @property
    def usable(self) -> int:
        """Pages that exist for requests: all but the scratch page."""
        return self.num_pages - 1

    @property
    def available(self) -> int:
        return self._top

    def reset(self) -> None:
        """Every page is free again; low page ids are handed out first."""
        self._stack[:] = np.arange(self.num_pages - 1, 0, -1, dtype=np.int32)
        self._top = self.num_pages - 1
        self._is_free[:] = True
        self._is_free[0] = False

    def allocate(self, count: int) -> NDArray[np.int32] | None:
        """`count` pages as int32 [count], or None (and nothing changes) when fewer are free."""
        if count > self._top:
            return None
        pages = self._stack[self._top - count : self._top][::-1].copy()
        self._top -= count
        self._is_free[pages] = False
        return pages

    def free(self, pages: NDArray[np.int32]) -> None:
        """Take pages back.

        Raises:
            ValueError: if one is scratch, free already, or given twice; then nothing changes.
        """
        count = len(pages)
        if count == 0:
            return
        if self._is_free[pages].any() or (pages <= 0).any():
            raise ValueError(f"freed twice, or never handed out: pages {pages[self._is_free[pages] | (pages <= 0)]}")
        if count > 1:
            ordered = np.sort(pages)
            if (ordered[1:] == ordered[:-1]).any():
                raise ValueError(f"the same page given twice in one call: {ordered.tolist()}")
        self._is_free[pages] = True
        self._stack[self._top : self._top + count] = pages
        self._top += count

    def free_pages(self) -> NDArray[np.int32]:
        """A copy of the free list, for checks."""
        return self._stack[: self._top].copy()
