"""Recording while an engine serves: in pauses, and rarely between the steps of requests that only decode.

Nobody waits for a recording. In a pause the queue is looked at between any two of them and between the layers of each
(`looks`), and what would go on for longer than `BOUND_SECONDS` without a look is not begun: it has been recorded before
the engine was ready, or never is. Under load without pauses only what steps have asked for again and again is recorded,
if it takes at most `BUSY_SECONDS`, never in a step that begins requests, and for a `DUTY`-th of the time.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.core.batch import Batch
    from phloem.engine.recorded.graphs import StepGraphs

BOUND_SECONDS = 0.1  # that a request which comes in a pause may wait
BUSY_SECONDS = 0.1  # running requests may miss this many
DUTY = 20


class Way(Protocol):
    """What is asked of a way of running steps by recordings."""

    graphs: StepGraphs[Any, Any]


class Gaps:
    """The gaps of one runner, used by its thread alone. `clock`: seconds, for tests."""

    def __init__(self, ways: Sequence[Way], clock: Callable[[], float] = perf_counter) -> None:
        self._ways = ways
        self._clock = clock
        self._next = 0.0  # not before then under load

    def leave_when(self, waiting: Callable[[], bool]) -> None:
        """`waiting`: tells whether a step is in the queue."""
        for way in self._ways:
            way.graphs.looks.waiting = waiting

    def idle(self) -> bool:
        """Record one more step, whole decode steps first. False when there is nothing to record."""
        for way in self._ways:
            stretch = way.graphs.looks.stretch
            if stretch is not None and stretch <= BOUND_SECONDS and way.graphs.idle():
                return True
        return False

    def begun(self, batch: Batch) -> None:
        """A step has been given to the device: record what is due, if nobody has just come."""
        if not batch.is_decode or batch.admissions or self._clock() < self._next:
            return
        for way in self._ways:
            graphs = way.graphs
            seconds = graphs.looks.seconds
            if seconds is not None and seconds <= BUSY_SECONDS and graphs.due():
                start = self._clock()
                with graphs.looks.for_at_most(BUSY_SECONDS):
                    graphs.idle()
                end = self._clock()
                self._next = end + DUTY * (end - start)
                return
