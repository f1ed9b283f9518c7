"""What an exhausted memory looks like: torch, Python and the libraries below them each say it in their own way."""

from __future__ import annotations

import errno

import torch

# Libraries that torch calls raise a plain RuntimeError; so does torch's own allocator of host memory.
_SAYINGS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "status_alloc_failed",
    "resource_exhausted",  # of XLA, whose texts differ from device to device
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed because the device or the host had no memory left for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # no address space for a mapping
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)


def first_line(error: BaseException) -> str:
    """The error's first line: torch adds a page of advice."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
