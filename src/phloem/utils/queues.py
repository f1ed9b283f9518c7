"""Waiting for a queue, for a time."""

from __future__ import annotations

import queue
from typing import TypeVar

T = TypeVar("T")


def within(source: queue.SimpleQueue[T], seconds: float | None) -> T:
    """The next thing in a queue that this thread alone reads, waited for up to `seconds` (None: for ever).

    `SimpleQueue.get` of CPython 3.11 waits for ever if its lock was left open by a `put` whose item was taken without
    it, and the time is up when it has taken the lock: it then counts with a negative rest. Where that is a tenth of a
    millisecond, on a busy machine, it happens within minutes. An empty queue's lock is closed by `get_nowait`.

    Raises:
        queue.Empty: nothing came.
    """
    try:
        return source.get_nowait()
    except queue.Empty:
        if seconds is not None and seconds <= 0:
            raise
    return source.get(timeout=seconds)
