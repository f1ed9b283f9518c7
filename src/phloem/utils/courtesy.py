"""Work beside others, in portions: whoever computes in steps waits for a core, or for Python's lock, as long as one
portion takes, and has them as long behind it.

A priority does not do that: the system lets a thread of a low one go on until its time slice ends, and while it has
Python's lock all others wait for it.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

PORTION = 0.0003  # seconds
LONGEST_REST = 0.002
LATELY = 0.02  # seconds that others count as busy after they were seen so: between two steps they are not


class _Own(threading.local):
    courtesy: Courtesy | None = None


_own = _Own()


class Courtesy:
    """Of a thread. `busy`: whether others compute now; asked about every portion, in that thread."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._since = time.perf_counter()
        self._seen = float("-inf")

    def begin(self) -> None:
        """From now on the calling thread is courteous, and has no threads of torch's beside it."""
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        # That of the calling thread is set so, and what threads begin with that come later: this one is set back.
        other = threading.Thread(target=torch.set_num_threads, args=(usual,), name="phloem-threads")
        other.start()
        other.join()
        _own.courtesy = self

    def give_way(self) -> None:
        now = time.perf_counter()
        worked = now - self._since
        if worked < PORTION:
            return
        if self._busy():
            self._seen = now
        if now - self._seen < LATELY:
            time.sleep(min(worked, LONGEST_REST))
        self._since = time.perf_counter()


def give_way() -> None:
    """Between two portions. Returns at once in threads that are not courteous."""
    courtesy = _own.courtesy
    if courtesy is not None:
        courtesy.give_way()
