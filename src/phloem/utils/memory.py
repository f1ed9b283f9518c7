"""Large blocks of host memory, straight from the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

HUGE = 2 << 20  # a huge page on x86-64 and on most arm64 kernels

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def zeros(nbytes: int) -> Bytes:
    """`nbytes` zero bytes at a 64-byte boundary at least; nothing is resident before it is touched.

    A block of a huge page or more lies on huge pages where the system has them: streaming through memory is then up to
    twice as fast on virtual machines, whose address translation is expensive. The mapping must be private for that:
    what Python's `mmap` makes by default is shared memory, which most systems keep on small pages. What is left behind
    the last whole huge page lies on small ones: a huge page for it would be resident whole.
    """
    huge = nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE")
    size = max(nbytes, 1) + (HUGE if huge else 0)
    if hasattr(mmap, "MAP_PRIVATE"):
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        mapping = mmap.mmap(-1, size)
    block = np.frombuffer(mapping, np.uint8)
    start = -block.ctypes.data % HUGE if huge else 0
    if huge:
        whole = nbytes // HUGE * HUGE
        mapping.madvise(mmap.MADV_HUGEPAGE, start, whole)
        mapping.madvise(mmap.MADV_NOHUGEPAGE, start + whole, size - start - whole)
    return block[start : start + nbytes]


DONT_NEED = 4  # Linux: anonymous memory goes at once
POPULATE_WRITE = 23  # Linux 5.14: makes pages resident and writable without changing what they hold


def populate(address: int, nbytes: int) -> bool:
    """Make `nbytes` from a page boundary resident now, so that their first use is no page fault. False where the
    system cannot. Other threads run meanwhile, and may use the memory."""
    if not sys.platform.startswith("linux"):
        return False
    # Not `mmap.madvise`: that keeps the interpreter lock for as long as it takes.
    return _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), POPULATE_WRITE) == 0


def discard(spans: Iterable[tuple[int, int]]) -> int:
    """Give the system the memory of (address, bytes): what it held is lost, the addresses stay, and whatever is touched
    again begins as zeros. Only whole pages can go; neighbours count as one. Bytes given back; 0 where it cannot."""
    if not sys.platform.startswith("linux"):
        return 0
    whole: list[list[int]] = []
    for start, size in sorted(spans):
        if whole and start - whole[-1][1] < 64:  # what lies between two pieces of a slab is padding
            whole[-1][1] = max(whole[-1][1], start + size)
        else:
            whole.append([start, start + size])
    done, page = 0, mmap.PAGESIZE
    for start, end in whole:
        first, last = -(-start // page) * page, end // page * page
        if last > first and _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED) == 0:
            done += last - first
    return done


def trim() -> None:
    """Give free memory of the C library's allocator back to the system, where it can."""
    release = getattr(_libc(), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if release is not None:
        release(0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names in `mallopt`
_LARGEST_KEPT = 32 << 20  # its bound for the second


def keep_freed() -> bool:
    """Let the C library's allocator keep what is freed, blocks of up to 32 MiB included, where it can. A process that
    makes and frees the same large blocks at every step else takes a page fault for each of their pages, each time."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        change = _libc().mallopt
    except AttributeError:
        return False
    return bool(change(_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(change(_TRIM_THRESHOLD, (1 << 31) - 1))


_MAPPED = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-[-x]p \S+ \S+ \d+ +/.*(?:\.so[0-9.]*|/python[0-9.]*)")


def release_libraries(smaps: Path = Path("/proc/self/smaps")) -> int:
    """Let go of the pages of libraries that nobody has written to: bytes that were resident.

    They stay in the system's cache, and what is used again is mapped again when it is touched. Most of what a start
    maps it touches once, for relocations and constructors, with the pages around it that the system adds. To be called
    while no other thread loads a library: the loader writes to pages that are not to be written to later.
    """
    if not smaps.exists() or not hasattr(mmap, "MADV_DONTNEED"):
        return 0
    released = 0
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read_text()):
        head, _, rest = entry.partition("\n")
        found = _MAPPED.fullmatch(head)
        if found is None:
            continue
        sizes = dict(re.findall(r"^(Rss|Anonymous|Swap): +(\d+) kB$", rest, re.MULTILINE))
        # A page of this process's own would be lost: relocated tables, breakpoints.
        if sizes.get("Anonymous") != "0" or sizes.get("Swap") != "0" or sizes.get("Rss", "0") == "0":
            continue
        start, end = (int(found[i], 16) for i in (1, 2))
        if _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED) == 0:
            released += int(sizes["Rss"]) << 10
    return released


def background_thread() -> None:
    """Let the calling thread run only where a core would be idle, if the system can."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
