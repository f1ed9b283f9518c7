"""Large blocks of host memory, straight from the system."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

HUGE = 2 << 20  # a huge page on x86-64 and on most arm64 kernels

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def zeros(nbytes: int) -> Bytes:
    """`nbytes` zero bytes at a 64-byte boundary at least; nothing is resident before it is touched.

    A block of a huge page or more lies on huge pages where the system has them: streaming through memory is then up to
    twice as fast on virtual machines, whose address translation is expensive. The mapping must be private for that:
    what Python's `mmap` makes by default is shared memory, which most systems keep on small pages.
    """
    huge = nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE")
    size = max(nbytes, 1) + (HUGE if huge else 0)
    if hasattr(mmap, "MAP_PRIVATE"):
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        mapping = mmap.mmap(-1, size)
    if huge:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    block = np.frombuffer(mapping, np.uint8)
    start = -block.ctypes.data % HUGE if huge else 0
    return block[start : start + nbytes]
