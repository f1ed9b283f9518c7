"""The order of begin and land: on a device, step n + 1 is begun before the host reads what step n gave.

A step's tokens stay on the device, where the next step takes them; their values travel to the host beside the
computation. On a CPU a step has its values as soon as it was begun. If the next one is there already, it lands when
that one is about to compute (`Pipeline.settle`): whoever waits for the values would else take the interpreter's lock,
and the cores would wait until it is done with them.
"""

from __future__ import annotations

import queue
from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from phloem.utils.queues import within

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.core.batch import StepOutput


class Settle(Protocol):
    """What `begin` calls when only the computation of its step is left to do, where the pipeline `settles`; with
    `values`, anywhere, when it needs what the step before has given."""

    def __call__(self, values: bool = False) -> None: ...


J = TypeVar("J")  # what a step is begun from

IDLE_SECONDS = 0.2  # nothing has come for so long: time to prepare for what may come
NEXT_SECONDS = 0.002  # between two preparations
POLL_SECONDS = 0.0001  # how often a step in flight is asked whether it has ended, while no other one comes


class Answer(Protocol):
    """Where a result goes."""

    def set(self, output: Any, /) -> None: ...

    def fail(self, error: BaseException) -> None: ...


@dataclass(slots=True)
class Flight:
    """A step that the device has been given. `land` waits for its values; `ready` tells whether it would wait."""

    land: Callable[[], StepOutput]
    ready: Callable[[], bool]


@dataclass(slots=True)
class Between:
    """What is run between two steps, with none in flight; an error of it goes to its answer alone."""

    work: Callable[[], Any]
    answer: Answer


class Pipeline(Generic[J]):
    """Begins and lands steps in their order, with at most `ahead` in flight while another is begun.

    Args:
        begin: gives a batch to the device. It must not wait for the step in flight, but for what it gives it to do
            before it calls `settle` for its values. Where `settles`, it computes, and
            calls what it is given beside the batch just before.
        needs_values: whether a batch can only be begun when the step before it has landed (a grammar's mask follows
            from the token sampled last).
        idle: called while nothing is asked for; False when it has nothing more to do.
        settles: see `begin`.
        ahead: how many may be in flight; where it is more than one, nothing settles.
    """

    def __init__(
        self,
        begin: Callable[[J, Settle], Flight],
        needs_values: Callable[[J], bool],
        idle: Callable[[], bool] | None = None,
        settles: bool = False,
        ahead: int = 1,
    ) -> None:
        self.busy_since = 0.0  # perf_counter at which the oldest step in flight began; 0 when there is none
        self._begin = begin
        self._needs_values = needs_values
        self._idle = idle
        self._settles, self._ahead = settles, ahead
        self._beginning = 0.0  # perf_counter at which the step that is being begun was; 0 between two
        self._flying: deque[tuple[Answer, Flight, float]] = deque()  # the oldest first, and when it began

    def run(self, source: queue.SimpleQueue[tuple[J, Any] | Between | None]) -> None:
        """Serve until None comes; a step that fails is answered and the next one runs."""
        while (item := self._next(source)) is not None:
            if isinstance(item, Between):
                self._land_all()
                self._between(item)
                continue
            batch, answer = item
            if self._flying and self._asks(batch):
                self._land_all()
            began = self._beginning = perf_counter()
            self.busy_since = self.busy_since or began
            try:
                flight = self._begin(batch, self.settle)
            except BaseException as error:  # the scheduler fails the step's requests; the thread must live on
                self._beginning = 0.0
                self._land_all()
                self.busy_since = 0.0
                answer.fail(error)
                continue
            self._beginning = 0.0
            while len(self._flying) >= self._ahead:
                self._land()
            self._flying.append((answer, flight, began))
            self.busy_since = self._flying[0][2]
        self._land_all()

    def settle(self, values: bool = False) -> None:
        """The step that is being begun will now compute, or needs `values`: answer for the one before it."""
        if self._settles or values:
            self._land_all()

    @staticmethod
    def _between(item: Between) -> None:
        try:
            found = item.work()
        except BaseException as error:
            item.answer.fail(error)
        else:
            item.answer.set(found)

    def _asks(self, batch: J) -> bool:
        try:
            return self._needs_values(batch)
        except Exception:  # `begin` will meet the same and answer for it
            return True

    def _next(self, source: queue.SimpleQueue[tuple[J, Any] | Between | None]) -> tuple[J, Any] | Between | None:
        """The next step; whatever is in flight is landed when it has ended before that one comes."""
        while self._flying:
            if self._flying[0][1].ready():
                if self._settles:
                    try:
                        return source.get_nowait()
                    except queue.Empty:
                        pass
                self._land()
                continue
            try:
                return within(source, POLL_SECONDS)
            except queue.Empty:
                pass
        wait = IDLE_SECONDS
        while self._idle is not None:
            try:
                return within(source, wait)
            except queue.Empty:
                if not self._idle():
                    break
                wait = NEXT_SECONDS
        return source.get()

    def _land_all(self) -> None:
        while self._flying:
            self._land()

    def _land(self) -> None:
        """The oldest in flight."""
        answer, flight, _ = self._flying.popleft()
        try:
            output = flight.land()
        except BaseException as error:
            answer.fail(error)
        else:
            answer.set(output)
        finally:
            self.busy_since = self._flying[0][2] if self._flying else self._beginning
