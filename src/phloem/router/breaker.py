"""A circuit breaker: a server that fails often gets nothing for a while, then one request that tries it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from phloem.router.settings import Settings

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Pure: the caller says what time it is, in seconds."""

    def __init__(self, settings: Settings) -> None:
        self._failures: deque[float] = deque()
        self._most = settings.cb_failure_threshold
        self._window = settings.cb_window_duration_secs
        self._rest = settings.cb_timeout_duration_secs
        self._needed = settings.cb_success_threshold
        self._off = settings.disable_circuit_breaker
        self._opened: float | None = None
        self._successes = 0
        self._trying = False
        self.opened_total = 0

    def state(self, now: float) -> State:
        if self._opened is None:
            return "closed"
        return "half_open" if now - self._opened >= self._rest else "open"

    def allows(self, now: float) -> bool:
        if self._opened is None or self._off:
            return True
        return now - self._opened >= self._rest and not self._trying

    def begun(self, now: float) -> None:
        """A request goes there."""
        self._trying = self._trying or self.state(now) == "half_open"

    def answered(self) -> None:
        """The one that tries it has its first byte: others need not wait until a long answer ends."""
        self._trying = False

    def let_go(self) -> None:
        """It ended in a way that says nothing of the server."""
        self._trying = False

    def succeeded(self) -> None:
        self._trying = False
        if self._opened is None:
            return
        self._successes += 1
        if self._successes >= self._needed:
            self.reset()

    def failed(self, now: float) -> None:
        if self._opened is not None:
            if self.state(now) == "half_open":
                self._opened, self._trying, self._successes = now, False, 0
            return
        self._failures.append(now)
        while now - self._failures[0] > self._window:
            self._failures.popleft()
        if len(self._failures) >= self._most and not self._off:
            self._opened, self._successes, self._trying = now, 0, False
            self.opened_total += 1

    def reset(self) -> None:
        self._opened, self._successes, self._trying = None, 0, False
        self._failures.clear()
