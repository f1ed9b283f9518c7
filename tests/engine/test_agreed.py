"""Step graphs of several ranks: a size is recorded on all of them, or on none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from phloem.core.errors import EngineDead
from phloem.distributed.comm import Threads
from phloem.engine.recorded.agreed import AgreedRecorder
from phloem.engine.recorded.graphs import StepGraphs
from phloem.kernels.graph import RecordError, RecordingEnded


class Graph:
    bytes = 10

    def replay(self, *sizes: int) -> None: ...


class Recorder:
    """Runs the step, then fails as it is told to."""

    cuts, resizes = True, False

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def record(self, fn: Callable[[], Any]) -> tuple[Graph, Any]:
        found = fn()
        if self.failure is not None:
            raise self.failure
        return Graph(), found

    def record_pieces(self, fn: Callable[[Any], Any]) -> tuple[Graph, Any]:
        return self.record(lambda: fn(None))

    def record_sizes(self, fn: Any, sizes: Any) -> Any:
        raise AssertionError


def ranks(work: Callable[[Threads], Any], size: int = 3) -> list[Any]:
    ends = Threads.group(size, 20.0)
    found: list[Any] = [None] * size

    def one(end: Threads) -> None:
        try:
            found[end.rank] = work(end)
        except Exception as error:
            found[end.rank] = error

    threads = [threading.Thread(target=one, args=(end,)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def meets(end: Threads) -> Callable[..., torch.Tensor]:
    return lambda *_: end.all_reduce(torch.ones(2))


@pytest.mark.parametrize("pieces", [False, True])
def test_what_all_ranks_record_is_there_on_all(pieces: bool) -> None:
    def work(end: Threads) -> Any:
        recorder = AgreedRecorder(Recorder(), end)
        assert recorder.cuts and not recorder.resizes
        return (recorder.record_pieces if pieces else recorder.record)(meets(end))

    for graph, found in ranks(work):
        assert isinstance(graph, Graph) and found.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("failure", [RecordError("it looks at a value"), torch.OutOfMemoryError("no memory")])
def test_what_one_rank_cannot_capture_no_rank_has_and_they_go_on(failure: Exception) -> None:
    def work(end: Threads) -> Any:
        recorder, own = AgreedRecorder(Recorder(failure if end.rank == 1 else None), end), []
        for _ in range(2):
            try:
                recorder.record(meets(end))
            except Exception as error:
                own.append(error)
        return own, end.all_reduce(torch.ones(1)).item()

    for rank, (errors, total) in enumerate(ranks(work)):
        assert total == 3 and len(errors) == 2
        for error in errors:
            assert error is failure if rank == 1 else str(error) == "rank 1 failed to record it"
            assert rank == 1 or isinstance(error, RecordError)


def test_what_one_rank_has_no_room_for_no_rank_has() -> None:
    def work(end: Threads) -> Any:
        recorder = AgreedRecorder(Recorder(), end, 10 if end.rank == 2 else None)
        recorder.record(meets(end))
        with pytest.raises(RecordError) as caught:
            recorder.record(meets(end))
        return str(caught.value)

    assert ranks(work) == ["rank 2 has no more memory for graphs"] * 3


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_where_the_others_wait_ends_them(failing: int) -> None:
    """In the run before the capture; nobody waits for ever, and no size is just given up."""

    def work(end: Threads) -> Any:
        def step() -> torch.Tensor:
            if end.rank == failing:
                raise torch.OutOfMemoryError("no memory")
            return end.all_reduce(torch.ones(2))

        AgreedRecorder(Recorder(), end).record(step)

    for rank, error in enumerate(ranks(work)):
        why = f"rank {failing} failed in a step that was to be recorded: OutOfMemoryError: no memory"
        if rank == failing:
            assert str(error) == why and isinstance(error, EngineDead if rank else RecordError)
        else:
            assert isinstance(error, EngineDead if rank else RecordError) and "has gone" in str(error)


def test_another_rank_records_once_what_it_is_told_and_the_first_tells_each_attempt() -> None:
    tried: list[int] = []

    def make(size: int) -> tuple[int, Graph, int]:
        tried.append(size)
        if size == 4:
            raise RecordError("not this one")
        return size, Graph(), size

    others = StepGraphs(8, make)
    others.once(4)
    others.once(2)
    assert tried == [4, 2] and others.of(2).size == 2 and not others.given_up
    with pytest.raises(KeyError):
        others.of(4)
    told: list[int] = []
    first: StepGraphs[int, int] = StepGraphs(4, make, sizes=[2, 4])
    first.announce = told.append
    first.record_all()
    assert told == [4, 4, 2] and first.given_up == {4: "not this one"}


def test_nothing_is_recorded_once_another_rank_has_gone() -> None:
    def gone(size: int) -> None:
        raise RecordingEnded("rank 1 of 2 has gone")

    graphs: StepGraphs[int, int] = StepGraphs(8, lambda size: (size, Graph(), size))
    graphs.announce = gone
    assert graphs.idle() and not graphs.idle() and graphs.refused == "rank 1 of 2 has gone" and not graphs.given_up
