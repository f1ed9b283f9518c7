"""Pages on their way from a store to rows in host memory, for one request that waits for them (`core.late.Late`)."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.core.errors import PhloemError
    from phloem.kvcache.tiers import Tier
    from phloem.kvcache.tiers.host import Tier as Host

Prefetch = Literal["best_effort", "wait_complete", "timeout"]
TIMEOUT_BASE, TIMEOUT_PER_KI_TOKEN, TIMEOUT_MOST = 1.0, 0.25, 30.0  # seconds
PART = 16  # pages that are asked for at once: so many wait for each other


@dataclass(frozen=True)
class Waiting:
    """How long a request waits: until it could run (best_effort), for all of it, or for a time by its tokens."""

    policy: Prefetch = "timeout"
    base: float = TIMEOUT_BASE
    per_ki_token: float = TIMEOUT_PER_KI_TOKEN

    def seconds(self, tokens: int) -> float:
        if self.policy != "timeout":
            return float("inf")
        return min(TIMEOUT_MOST, self.base + self.per_ki_token * tokens / 1024)


@dataclass(eq=False)
class Claim:
    """Rows pinned for a request that enters its slot: nobody else loses or changes them. `stored`: those of them that
    were fetched from the store for it."""

    request_id: str
    rows: list[int]
    stored: int = 0
    state: list[int] = field(default_factory=list[int])  # rows of the state behind them, where there are states

    @property
    def count(self) -> int:
        return len(self.rows)


class Fetch:
    """Reads `keys` from `start` on into rows, in a thread, until one is not there. `rows`: pinned for the request.

    What comes after the request has stopped waiting is kept as any row is, for whoever wants it.
    """

    error: PhloemError | None = None

    def __init__(self, keys: Sequence[bytes], start: int, pinned: list[int], deadline: float) -> None:
        self.keys, self.start, self.deadline = keys, start, deadline
        self.rows = pinned
        self.arrived: set[bytes] = set()  # keys that came from the store
        self.read = 0  # pages that were read, and whether the store had no row for some
        self.short = False
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._let_go = False
        self.could_run: Callable[[], bool] | None = None  # of best_effort
        self.clock: Callable[[], float] | None = None

    def ready(self) -> bool:
        if self._done.is_set():
            return True
        if self.could_run is not None and self.could_run():
            return True
        return self.clock is not None and self.clock() >= self.deadline

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """Until the thread has ended, for tests and the end."""
        self._done.wait()

    def let_go(self, host: Host) -> None:
        """The request has ended, or has what it wants: its rows may go, and no more are read for it."""
        with self._lock:
            if self._let_go:
                return
            self._let_go = True
            rows, self.rows = self.rows, []
        host.unpin(rows)

    def run(self, host: Host, storage: Tier) -> None:
        """In a thread. Never raises."""
        try:
            at = self.start
            if not storage.instant:
                self.keys = self.keys[: at + storage.exists(self.keys[at:])]
            while at < len(self.keys) and not self._let_go:
                keys = self.keys[at : at + PART]
                done = self._part(keys, host, storage)
                at += done
                if done < len(keys):
                    break
        finally:
            self._done.set()

    def _part(self, keys: Sequence[bytes], host: Host, storage: Tier) -> int:
        there = host.find(keys)  # another request has fetched them
        if there:
            self._have(there, host)
            return len(there)
        taken = host.take(len(keys))
        if len(taken) < len(keys):
            self.short = True
        count = 0
        try:
            count = storage.read(keys[: len(taken)], [host.row(row) for row in taken]) if taken else 0
        finally:
            host.publish(keys[:count], taken[:count])
            host.unpin(taken[count:])
        self.read += count
        self.arrived.update(keys[:count])
        self._have(taken[:count], host)
        return count

    def _have(self, rows: Sequence[int], host: Host) -> None:
        with self._lock:
            if not self._let_go:
                self.rows += rows
                return
        host.unpin(rows)
