"""When an engine that has nothing to do gives memory back."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phloem.core.messages import Heartbeat

# Seconds without a step after which what the allocator has kept is given back all the same.
REST = 3.0


class Resting:
    """Told of every heartbeat: calls `rest` once when no step has run for REST seconds, and again only after work."""

    def __init__(self, rest: Callable[[], None], clock: Callable[[], float] = monotonic) -> None:
        self._rest, self._clock = rest, clock
        self._step, self._since = -1, clock()
        self._rested = False

    def __call__(self, beat: Heartbeat) -> None:
        if beat.step != self._step:
            self._step, self._since, self._rested = beat.step, self._clock(), False
        elif not self._rested and beat.busy_seconds == 0 and self._clock() - self._since >= REST:
            self._rested = True
            self._rest()
