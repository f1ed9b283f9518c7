"""The thread that runs the steps: their queue, their order, and what is left as it was when one finds no memory.

It knows no model: how a step begins, and what is forgotten after a failure, it is told.
"""

from __future__ import annotations

import gc
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from phloem.core.errors import OutOfMemory
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.engine.pipeline import Between, Flight, Pipeline
from phloem.utils.profiler import span

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from phloem.core.batch import Batch, Follower, StepOutput
    from phloem.engine.pipeline import Settle

T = TypeVar("T")


class Launched(Generic[T]):
    """Work in the runner's queue or on the device (`core.batch.Pending`).

    Whoever waits takes a lock that its end lets go: an event would make such a lock for each wait, in Python.
    """

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._running.acquire()
        self._ended = False
        self._found: T | None = None
        self._error: BaseException | None = None

    def set(self, found: T) -> None:
        self._found = found
        self._ended = True
        self._running.release()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._ended = True
        self._running.release()

    def done(self) -> bool:
        return self._ended

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; True when the work has ended."""
        ended = self._running.acquire(timeout=timeout)
        if ended:
            self._running.release()
        return ended

    def result(self) -> T:
        with self._running:
            pass
        if self._error is not None:
            raise self._error
        return self._found  # pyright: ignore[reportReturnType] - what `set` was given


@dataclass(slots=True)
class Order:
    """A launched batch, and who follows the requests that it admits, by slot."""

    batch: Batch
    followers: Mapping[int, Follower | None]


class StepThread:
    """Runs what is launched, in that order.

    Args:
        begin: gives a step to the device (`pipeline.Flight`); it gets `Pipeline.settle` too.
        needs_values: whether a step can only be begun when the one before it has landed.
        forget: drops what a step that ran out of memory has left, and every request.
        give_back: frees what the device's allocator keeps without using it; called after `forget`.
        idle: as in `Pipeline`.
        settles, ahead: as in `Pipeline`.
    """

    def __init__(
        self,
        begin: Callable[[Order, Settle], Flight],
        needs_values: Callable[[Batch], bool],
        forget: Callable[[], None],
        *,
        give_back: Callable[[], None] | None,
        idle: Callable[[], bool] | None,
        settles: bool,
        ahead: int = 1,
    ) -> None:
        saved = _Saved(begin, forget, give_back)
        self._pipeline = Pipeline[Order](
            saved.begin, lambda order: needs_values(order.batch), idle, settles=settles, ahead=ahead
        )
        self._queue: queue.SimpleQueue[tuple[Order, Any] | Between | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, first: Callable[[], None] | None) -> None:
        """`first` is called once in the thread, before any step."""
        work = _run, (self._pipeline, self._queue, first)
        self._thread = threading.Thread(target=work[0], args=work[1], name="phloem-runner", daemon=True)
        self._thread.start()

    def launch(self, order: Order) -> Launched[StepOutput]:
        pending: Launched[StepOutput] = Launched()
        self._queue.put((order, pending))
        return pending

    def between(self, work: Callable[[], T]) -> Launched[T]:
        """Run `work` behind every launched step, with none in flight; what it raises is its result's alone."""
        pending: Launched[T] = Launched()
        self._queue.put(Between(work, pending))
        return pending

    def close(self) -> None:
        """End the thread after what was launched."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout=30)

    @property
    def waiting(self) -> Callable[[], bool]:
        """Tells whether something was launched that has not been begun."""
        source = self._queue
        return lambda: not source.empty()

    @property
    def busy_since(self) -> float:
        """perf_counter at which the oldest step in progress began; 0 when idle."""
        return self._pipeline.busy_since


def _run(pipeline: Pipeline[Order], source: queue.SimpleQueue[Any], first: Callable[[], None] | None) -> None:
    if first is not None:
        first()
    with torch.inference_mode():
        pipeline.run(source)


def _named(batch: Batch) -> str:
    kind = "decode" if batch.is_decode else "step"
    return f"{kind} {batch.step}: {batch.num_rows} rows, {batch.num_tokens} tokens"


class _Saved:
    """Steps that find no memory never happened. It does not know the thread: nothing here points in a circle, so that
    what a closed runner held is freed with the last reference to it.
    """

    def __init__(
        self,
        begin: Callable[[Order, Settle], Flight],
        forget: Callable[[], None],
        give_back: Callable[[], None] | None,
    ) -> None:
        self._start_step, self._forget, self._give_back = begin, forget, give_back
        self._closed_epoch = -1  # batches up to this one's epoch were launched before a failure was known

    def begin(self, order: Order, settle: Settle) -> Flight:
        """Give a step to the device; what it gives is read when the flight lands.

        Raises:
            OutOfMemory: for this step, and for those of its epoch behind it.
        """
        epoch = order.batch.epoch
        if epoch <= self._closed_epoch:
            raise OutOfMemory("launched behind a step that ran out of memory")
        with span(lambda: _named(order.batch)):
            flight = self._saved(epoch, lambda: self._start_step(order, settle))
        return Flight(lambda: self._saved(epoch, flight.land), flight.ready)

    def _saved(self, epoch: int, work: Callable[[], T]) -> T:
        """Do a part of a step; when there is no memory for it, forget the step, and free what can be freed."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        # Only here, where the error and the tensors that its frames hold have gone, can they be given back.
        self._closed_epoch = epoch
        self._forget()
        gc.collect(1)  # the young objects only: all of them take half a second
        if self._give_back is not None:
            self._give_back()
        raise OutOfMemory(why)
