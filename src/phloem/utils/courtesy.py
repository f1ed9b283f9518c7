"""Work beside steps that take all cores, in portions between two of them, each a fraction of what a step takes.

A priority does not do that: what works beside a step takes a core that the step's other threads wait for, the system
looks who is next a few times in a hundredth of a second, and whoever has Python's lock is waited for whatever his
priority is. So the steps' own thread lets a portion go, and waits for its end.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

LEAST, MOST = 0.0007, 0.02  # seconds of a portion
SHARE = 0.3  # of a step
LATELY = 0.02  # seconds that steps are said to run after they were seen to: between two of them none does
PATIENCE = 0.5  # seconds that a portion waits for its turn


class _Own(threading.local):
    courtesy: Courtesy | None = None


_own = _Own()


class _Turn:
    """A portion that waits for its turn, has it, or had it."""

    def __init__(self) -> None:
        self._begun, self._ended = threading.Lock(), threading.Lock()
        self._begun.acquire()
        self._ended.acquire()
        self.longest = 0.0  # seconds that the steps wait for its end

    def grant(self) -> None:
        """In the steps' thread: let it go, and wait for its end."""
        self._begun.release()
        self._ended.acquire(timeout=self.longest)

    def wait(self) -> None:
        """For the turn; without end nobody waits, as an engine may be closed."""
        if not self._begun.acquire(timeout=PATIENCE):
            self.longest = 0.0

    def end(self) -> None:
        self._ended.release()


class Courtesy:
    """Of one thread.

    Args:
        busy: whether steps run.
        between: runs work in the steps' thread between two of them; nobody waits for it here.
    """

    def __init__(self, busy: Callable[[], bool], between: Callable[[Callable[[], Any]], Any]) -> None:
        self._busy, self._between = busy, between
        self._turn: _Turn | None = None
        self._until = 0.0  # when the turn's portion is over
        self._seen = float("-inf")  # when steps ran
        self._portion = LEAST

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
        now = perf_counter()
        if self._turn is not None and now < self._until:
            return
        self.end()
        if self._busy():
            self._seen = now
        elif now - self._seen > LATELY:
            return
        turn = _Turn()
        turn.longest = 2 * self._portion
        self._between(turn.grant)
        turn.wait()
        begun = perf_counter()
        self._portion = min(max(SHARE * (begun - now), LEAST), MOST)
        self._turn, self._until = turn, begun + self._portion

    def end(self) -> None:
        """Whoever waits for the end of this portion goes on."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.end()


def give_way() -> None:
    """Between two portions. Returns at once in threads that are not courteous."""
    courtesy = _own.courtesy
    if courtesy is not None:
        courtesy.give_way()


@contextmanager
def courteous() -> Generator[None]:
    """Work in portions: steps wait for none of it once it has ended."""
    try:
        give_way()
        yield
    finally:
        leave()


def leave() -> None:
    """What comes is not done here: it is waited for, or nothing."""
    courtesy = _own.courtesy
    if courtesy is not None:
        courtesy.end()
