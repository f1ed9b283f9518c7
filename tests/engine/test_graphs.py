"""Bucket policy over a fake recorder, and the CUDA recorder and copy streams over fake streams and events."""

from __future__ import annotations

import contextlib
import gc
import weakref
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from phloem.engine.recorded.gaps import BOUND_SECONDS, Gaps
from phloem.engine.recorded.graphs import StepGraphs, bucket_sizes
from phloem.engine.recorded.looks import Looks
from phloem.kernels.graph import Interrupted, RecordError
from phloem.kernels.graph_cuda import Recorder, alias
from phloem.platforms import _streams as streams_file
from phloem.platforms._streams import Streams


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeGraph:
    def __init__(self, fn: Any) -> None:
        self.bytes = 1000
        self._fn = fn
        self.replays = 0

    def replay(self, *sizes: int) -> None:
        self.replays += 1
        self._fn()


class FakeRecorder:
    def __init__(self, fail: Exception | None = None) -> None:
        self.recorded = 0
        self.fail = fail

    def record(self, fn: Any) -> tuple[FakeGraph, Any]:
        if self.fail is not None:
            raise self.fail
        self.recorded += 1
        return FakeGraph(fn), fn()


def graphs(recorder: FakeRecorder, limit: int = 32, **options: Any) -> StepGraphs[list[int], list[int]]:
    def make(rows: int) -> tuple[list[int], Any, Any]:
        inputs, outputs = [0] * rows, [0] * rows

        def step() -> list[int]:
            outputs[:] = [2 * value for value in inputs]
            return outputs

        return inputs, *recorder.record(step)

    return StepGraphs(limit, make, **options)


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 7, 33, 200, 256, 1000])
def test_buckets(limit: int) -> None:
    sizes = bucket_sizes(limit)
    assert sizes == sorted(set(sizes)) and (sizes == [] if limit == 0 else sizes[-1] == limit)
    table = graphs(FakeRecorder(), limit)
    for rows in range(1, limit + 1):
        bucket = table.bucket(rows)
        assert bucket is not None and rows <= bucket <= rows * 1.25
    assert table.bucket(limit + 1) is None and table.bucket(0) is None


def test_a_bucket_is_recorded_when_it_has_been_wanted_often_enough() -> None:
    recorder = FakeRecorder()
    table = graphs(recorder, patience=3)
    assert table.get(9) is None and table.get(10) is None and recorder.recorded == 0
    step = table.get(9)
    assert step is not None and step.size == 10 and recorder.recorded == 1
    step.inputs[:] = range(10)
    assert step.replay() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert table.get(10) is step and table.get(100) is None


def test_idle_records_what_was_wanted_first_then_small_ones() -> None:
    recorder = FakeRecorder()
    table = graphs(recorder, limit=12, patience=99)
    for rows in (11, 11, 4):
        assert table.get(rows) is None
    while table.idle():
        pass
    order = list(table._steps)
    # 12 is the largest; of the others those that nobody asked for are recorded where they are likely.
    assert order == [12, 4, 1, 2, 8]
    assert not table.idle() and recorder.recorded == 5 and len(table.sizes) == 10
    assert table.describe().startswith("5 of 10 step graphs") and table.get(6) is None
    assert table.idle() and table.get(6) is not None and not table.idle()


def test_until_a_size_is_recorded_a_larger_graph_serves_it_that_is_not_twice_as_large() -> None:
    recorder = FakeRecorder()
    table = graphs(recorder, limit=32, inline=False, padded=16)
    table.record_likely(perf_counter() - 1)  # no time: one all the same, the largest
    assert recorder.recorded == 1 and table.get(32) is not None and table.get(12) is None
    for _ in range(6):
        table.idle()
    served = {rows: found.size for rows in range(1, 33) if (found := table.get(rows)) is not None}
    assert served == {1: 1, 2: 2, 3: 4, 4: 4, **dict.fromkeys(range(5, 9), 8), **dict.fromkeys(range(9, 13), 12),
                      **dict.fromkeys(range(13, 17), 16), **dict.fromkeys(range(29, 33), 32)}  # fmt: skip
    step = table.get(5)
    assert step is not None
    step.inputs[:5] = [1, 2, 3, 4, 5]
    assert step.replay()[:5] == [2, 4, 6, 8, 10]
    while table.idle():
        pass
    exact = table.get(5)
    assert exact is not None and exact.size == 5  # what was asked for has come meanwhile
    assert graphs(FakeRecorder(), limit=32, padded=16, patience=9).get(5) is None  # not where steps record themselves


def test_record_all_reports_progress() -> None:
    recorder, seen = FakeRecorder(), []
    table = graphs(recorder, limit=8)
    table.record_all(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(table.sizes), len(table.sizes)) and table.get(3) is not None
    table.drop()
    assert table.nbytes == 0 and table.get(3) is None


@pytest.mark.parametrize("error", [RecordError("op x is not known"), MemoryError(), torch.OutOfMemoryError("no")])
def test_what_cannot_be_recorded_runs_eagerly(error: Exception) -> None:
    table = graphs(FakeRecorder(error), patience=1)
    assert table.get(1) is None and table.given_up[1] in table.describe() and table.refused is None
    while table.idle():
        pass
    # Three sizes failed and none was recorded: the others are not tried.
    assert len(table.given_up) == 3 and table.refused is not None and table.refused in table.describe()
    assert not table.idle() and table.get(1) is None


def test_a_failed_recording_is_tried_once_more_and_then_that_size_alone_is_given_up() -> None:
    tried: list[int] = []

    def make(rows: int) -> tuple[int, Any, int]:
        tried.append(rows)
        if rows == 4 or (rows == 2 and tried.count(2) == 1):
            raise RecordError("operation failed due to a previous error during capture")
        return rows, FakeGraph(lambda: None), rows

    table = StepGraphs(8, make)
    table.record_all()
    assert tried == [8, 7, 6, 5, 4, 4, 3, 2, 2, 1]
    assert list(table.given_up) == [4] and table.refused is None and table.get(2) is not None
    assert table.get(4) is table.get(4) is None and tried.count(4) == 2  # and not a third time
    assert "not 4 rows: operation failed" in table.describe() and table.refusal(4) == table.given_up[4]
    facts = table.facts()
    assert facts["recorded"] == 7 and facts["given_up"] == {"4": table.given_up[4]} and facts["sizes"] == 8


def test_an_interrupted_recording_is_no_failure() -> None:
    waiting = True

    def make(rows: int) -> tuple[int, Any, int]:
        if waiting:
            raise Interrupted
        return rows, FakeGraph(lambda: None), rows

    table = StepGraphs(1, make)
    assert table.idle() and not table.given_up
    waiting = False
    assert table.idle() and not table.idle() and table.get(1) is not None


def test_the_likely_sizes_are_recorded_first_and_the_rest_while_time_is_left() -> None:
    recorder = FakeRecorder()
    table = graphs(recorder, limit=24)
    table.record_likely(perf_counter() + 60)
    assert recorder.recorded == len(table.sizes)
    order: list[int] = []

    def make(rows: int) -> tuple[int, Any, int]:
        order.append(rows)
        clock.now += 3.0
        return rows, FakeGraph(lambda: None), rows

    clock = Clock()
    table = StepGraphs(24, make, looks=Looks(clock))
    table.record_likely(clock.now + 60)
    assert order[:6] == [24, 16, 8, 4, 2, 1] and order[6:8] == [20, 14] and sorted(order) == table.sizes
    order.clear()
    table.drop()
    table.record_likely(clock.now + 2.0)  # what one takes is known: none begins that would not end in time
    assert not order


def test_on_a_device_no_step_waits_for_a_recording() -> None:
    recorder = FakeRecorder()
    table = graphs(recorder, limit=8, inline=False)
    assert [table.get(3) for _ in range(5)] == [None] * 5 and recorder.recorded == 0 and table.due()
    assert table.idle() and table.get(3) is not None and not table.due()


def decode_of(rows: int, **changes: Any) -> Any:
    return SimpleNamespace(**{"is_decode": True, "admissions": [], "num_rows": rows, **changes})


def test_under_load_what_is_due_is_recorded_rarely_and_never_for_a_step_with_newcomers() -> None:
    recorder, clock = FakeRecorder(), Clock()
    table = graphs(recorder, limit=16, inline=False)
    looks = table.looks = Looks(clock)
    gaps = Gaps([SimpleNamespace(graphs=table)], clock)  # type: ignore[list-item]
    for rows in (3, 3, 5, 5, 9, 9):
        table.get(rows)
    gaps.begun(decode_of(3))
    assert recorder.recorded == 0  # how long a recording takes is not known yet
    looks._seconds.append(0.05)
    gaps.begun(decode_of(3, admissions=["new"]))
    gaps.begun(decode_of(3, is_decode=False))
    assert recorder.recorded == 0
    record = recorder.record

    def slow(fn: Any) -> Any:
        clock.now += 0.05
        return record(fn)

    recorder.record = slow  # type: ignore[method-assign]
    gaps.begun(decode_of(3))
    gaps.begun(decode_of(3))
    assert recorder.recorded == 1
    clock.now += 0.9
    gaps.begun(decode_of(3))
    assert recorder.recorded == 1  # twenty times as long as it took
    clock.now += 0.2
    gaps.begun(decode_of(3))
    assert recorder.recorded == 2
    clock.now += 10
    looks._seconds.append(0.2)
    gaps.begun(decode_of(3))
    assert recorder.recorded == 2  # too long for running requests


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        graphs(FakeRecorder(ZeroDivisionError()), patience=1).get(1)


def test_memory_budget() -> None:
    table = graphs(FakeRecorder(), limit=8, patience=1, budget=2000)
    assert table.get(1) and table.get(2) and table.get(3) is None
    assert "budget" in (table.refused or "") and table.get(1) is not None


class FakeCuda:
    """Streams and events as a log: work is appended to the current stream, and waiting is noted."""

    def __init__(self, fail_in_capture: str | None = None) -> None:
        self.log: list[str] = []
        self.stack = ["main"]
        self.capturing = False
        self.free = 10_000
        self.fail = fail_in_capture
        self.made = 0

    def graph_pool_handle(self) -> str:
        return "pool"

    def Stream(self, device: Any = None) -> FakeStream:
        self.made += 1
        return FakeStream(self, f"s{self.made}")

    def Event(self) -> FakeEvent:
        return FakeEvent(self)

    def CUDAGraph(self) -> FakeGraph:
        return FakeCapture(self)

    def empty_cache(self) -> None:
        self.log.append("empty cache")

    def current_stream(self, device: Any = None) -> FakeStream:
        return FakeStream(self, self.stack[-1])

    def synchronize(self, device: Any = None) -> None:
        self.log.append("sync")

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.free, 20_000

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Any:
        self.stack.append(stream.name)
        try:
            yield
        finally:
            self.stack.pop()

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: str, stream: FakeStream, capture_error_mode: str) -> Any:
        assert pool == "pool"
        self.capturing = True
        try:
            yield
            if self.fail:
                raise RuntimeError(self.fail)
        finally:
            self.capturing = False
            self.free -= 64


class FakeCapture(FakeGraph):
    """A graph that is captured without `cuda.graph`."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(lambda: cuda.log.append("replay"))
        self.cuda = cuda

    def capture_begin(self, pool: str, capture_error_mode: str) -> None:
        assert not self.cuda.capturing and capture_error_mode == "thread_local"
        self.cuda.capturing = True
        self.cuda.log.append(f"begin in {pool} on {self.cuda.stack[-1]}")

    def capture_end(self) -> None:
        assert self.cuda.capturing
        self.cuda.capturing = False
        self.cuda.free -= 64
        if self.cuda.fail:
            raise RuntimeError(self.cuda.fail)
        self.cuda.log.append("end")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.log.append(f"{self.name} waits for event on {event.on}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.on = cuda, ""

    def record(self, stream: FakeStream | None = None) -> None:
        self.on = stream.name if stream else self.cuda.stack[-1]
        self.cuda.log.append(f"event on {self.on}")

    def synchronize(self) -> None:
        self.cuda.log.append(f"host waits for {self.on}")

    def query(self) -> bool:
        return False


@pytest.mark.slow
def test_recorder_warms_up_beside_and_captures_into_one_pool() -> None:
    cuda = FakeCuda()
    recorder = Recorder(torch.device("cpu"), cuda)
    runs: list[tuple[str, bool]] = []

    def step() -> str:
        runs.append((cuda.stack[-1], cuda.capturing))
        return "out"

    graph, out = recorder.record(step)
    assert out == "out" and graph.bytes == 64
    assert runs == [("s1", False), ("main", True)]
    assert cuda.log == ["s1 waits for main", "main waits for s1", "sync"]
    graph.replay()
    assert cuda.log[-1] == "replay"


@pytest.mark.slow
def test_recorder_says_why_a_step_cannot_be_captured() -> None:
    recorder = Recorder(torch.device("cpu"), FakeCuda("operation not permitted when stream is capturing\nmore"))
    with pytest.raises(RecordError, match=r"cannot be captured: operation not permitted when stream is capturing$"):
        recorder.record(lambda: 1)


class Mortal:
    """A device object whose end while a capture is open ends that capture."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.me = cuda, self  # in a circle: only the collector frees it

    def __del__(self) -> None:
        if self.cuda.capturing:
            self.cuda.fail = "operation failed due to a previous error during capture"


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [False, True])
def test_no_graph_is_freed_by_the_collector_during_a_capture(pieces: bool) -> None:
    cuda = FakeCuda()
    recorder = Recorder(torch.device("cpu"), cuda)
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)  # the collector runs at every chance
    try:

        def step(cut: Any = None) -> list[Any]:
            Mortal(cuda)
            made: list[Any] = [[[number]] for number in range(1000)]
            return made

        Mortal(cuda)
        assert gc.isenabled()
        _ = recorder.record_pieces(step) if pieces else recorder.record(step)
        assert gc.isenabled() and cuda.fail is None
        with pytest.raises(ZeroDivisionError):
            recorder.record(lambda: 1 // 0 if cuda.capturing else 1)
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)


@pytest.mark.slow
def test_recorder_works_under_step_graphs() -> None:
    cuda = FakeCuda()
    recorder = Recorder(torch.device("cpu"), cuda)
    table = StepGraphs(4, lambda rows: (rows, *recorder.record(lambda: rows)), patience=1)
    step = table.get(3)
    assert step is not None and step.replay() == 3 and table.nbytes == 64


def in_three(cuda: FakeCuda, cut: Any) -> torch.Tensor:
    """Two pieces with a call behind each."""
    cuda.log.append("first")
    x = torch.arange(6.0).view(2, 3)
    kept = cut.hold(x[:, 1:])
    cut(lambda: cuda.log.append(f"call with {kept.shape[1]}"))
    cuda.log.append("second")
    cut(lambda: cuda.log.append("last call"), more=False)
    return x


@pytest.mark.slow
def test_pieces_are_captured_into_one_pool_and_calls_stand_between_them() -> None:
    cuda = FakeCuda()
    graph, _ = Recorder(torch.device("cpu"), cuda).record_pieces(lambda cut: in_three(cuda, cut))
    warm, capture = cuda.log[: cuda.log.index("empty cache")], cuda.log[cuda.log.index("empty cache") + 1 :]
    assert warm == ["s1 waits for main", "first", "second", "main waits for s1", "sync"]
    begin = "begin in pool on s1"
    assert capture == [begin, "first", "end", begin, "second", "end"]  # no call runs, and no empty graph is left
    assert graph.graphs == 2 and graph.bytes == 128 and not cuda.capturing and cuda.stack == ["main"]
    cuda.log.clear()
    graph.replay()
    assert cuda.log == ["replay", "call with 2", "replay", "last call"]


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("not permitted\nmore"), KeyError(1)])
def test_an_error_between_cuts_leaves_no_capture_open(error: Exception) -> None:
    cuda = FakeCuda()

    def fails(cut: Any) -> None:
        cut(lambda: None)
        if cuda.capturing:
            raise error

    recorder = Recorder(torch.device("cpu"), cuda)
    expected = RecordError if type(error) is RuntimeError else type(error)
    with pytest.raises(expected):
        recorder.record_pieces(fails)
    assert not cuda.capturing and cuda.stack == ["main"]


@pytest.mark.slow
def test_a_broken_capture_is_refused_with_its_reason() -> None:
    cuda = FakeCuda("operation not permitted when stream is capturing\nmore")
    with pytest.raises(RecordError, match=r"cannot be captured: operation not permitted when stream is capturing$"):
        Recorder(torch.device("cpu"), cuda).record_pieces(lambda cut: in_three(cuda, cut))
    assert not cuda.capturing and cuda.stack == ["main"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_held_tensor_is_the_same_memory_without_owning_it(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        qkv = torch.arange(48, dtype=torch.float32).to(dtype).view(4, 12)
        view = qkv[:, 4:8].unflatten(-1, (2, 2))
        held = alias(view)
        assert held.data_ptr() == view.data_ptr() and held.shape == view.shape and held.stride() == view.stride()
        qkv[1, 4] = 7
        assert held[1, 0, 0].float() == 7 and torch.equal(held.float(), view.float())
    owner = torch.zeros(3)
    died = []
    weakref.finalize(owner, died.append, True)
    again = alias(owner)
    del owner
    assert died and again.shape == (3,)


def streams(cuda: FakeCuda) -> Streams:
    return Streams(torch.device("cpu"), ring=2, cuda=cuda, pin=False)


def test_inputs_go_up_in_one_copy_and_keep_shape_and_type() -> None:
    arrays = [
        np.arange(5, dtype=np.int32),
        np.ones((2, 3), np.float32),
        np.array([], np.int64),
        np.array([7], np.int64),
    ]
    got = streams(FakeCuda()).up(arrays)
    for tensor, array in zip(got, arrays, strict=True):
        assert tensor.shape == array.shape and torch.equal(tensor, torch.from_numpy(array))
        assert tensor.data_ptr() % 16 == 0 or not tensor.numel()


def test_a_staging_buffer_is_written_again_only_after_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_file, "MOST", 2)
    cuda = FakeCuda()
    side = streams(cuda)
    for value in range(3):
        side.up([np.full(4, value, np.int32)])
    assert cuda.log == ["event on main", "event on main", "host waits for main", "event on main"]


def test_a_ring_whose_buffers_are_all_in_use_grows_and_nobody_waits() -> None:
    cuda = FakeCuda()
    side = streams(cuda)
    for value in range(streams_file.MOST):
        side.up([np.full(4, value, np.int32)])
    assert cuda.log == ["event on main"] * streams_file.MOST
    side.up([np.full(4, 7, np.int32)])
    assert cuda.log[-2:] == ["host waits for main", "event on main"]


def test_results_come_down_behind_the_computation_and_beside_the_next() -> None:
    cuda = FakeCuda()
    arriving = streams(cuda).down([torch.tensor([1, 2]), torch.tensor([0.5])])
    assert cuda.log == ["event on main", "s1 waits for event on main", "event on s1"]
    assert not arriving.done()
    tokens, values = arriving.wait()
    assert tokens.tolist() == [1, 2] and values.tolist() == [0.5]
    assert cuda.log[-1] == "host waits for s1"


class Layers:
    """Recordings of so many layers, each of which takes a while by the clock."""

    def __init__(self, clock: Clock, layers: int, seconds: float, ends: float = 0.0) -> None:
        self.clock, self.layers, self.seconds, self.ends = clock, layers, seconds, ends
        self.looks = Looks(clock)
        self.comes = float("inf")  # when somebody comes
        self.looks.waiting = lambda: clock.now >= self.comes
        self.made: list[int] = []

    def make(self, rows: int) -> tuple[int, Any, int]:
        for _ in range(self.layers):
            self.looks.look()
            self.clock.now += self.seconds
        self.clock.now += self.ends  # what cannot be left: the graph is put together
        self.made.append(rows)
        return rows, FakeGraph(lambda: None), rows

    def graphs(self, limit: int) -> StepGraphs[int, int]:
        return StepGraphs(limit, self.make, inline=False, looks=self.looks)


@pytest.mark.parametrize(("layers", "seconds", "ends"), [(32, 0.03, 0.02), (80, 0.01, 0.08), (4, 0.09, 0.0)])
def test_nobody_who_comes_in_a_pause_waits_longer_than_the_bound(layers: int, seconds: float, ends: float) -> None:
    """Whole recordings take up to a second here; whoever comes, at whatever moment, waits for a stretch of one."""
    clock = Clock()
    for moment in np.linspace(0.0, 1.2, 23):
        work = Layers(clock, layers, seconds, ends)
        table = work.graphs(64)
        table.record_likely(clock.now)  # before ready; the first one, whatever it takes
        gaps = Gaps([SimpleNamespace(graphs=table)], clock)  # type: ignore[list-item]
        table.get(20)
        work.comes = clock.now + moment
        while clock.now < work.comes and gaps.idle():
            pass
        assert clock.now - work.comes <= BOUND_SECONDS + 1e-9
        assert table._steps.keys() == set(work.made)
        work.comes = float("inf")
        while gaps.idle():
            pass
        assert work.made[1:2] == [20] and {1, 2, 4, 8, 16, 20, 32, 64} == set(table._steps)


def test_what_goes_on_for_longer_without_a_look_is_never_begun_in_a_pause() -> None:
    clock = Clock()
    work = Layers(clock, 16, 0.01, ends=0.3)
    table = work.graphs(8)
    gaps = Gaps([SimpleNamespace(graphs=table)], clock)  # type: ignore[list-item]
    table.get(3)
    assert not gaps.idle() and not work.made  # nothing is known of them yet
    table.record_likely(clock.now + 1.0)
    assert set(work.made) == {8, 4}
    assert not gaps.idle() and table.facts()["longest_unseen_seconds"] == 0.31
    gaps.begun(decode_of(3))
    assert set(work.made) == {8, 4}


def test_under_load_a_recording_that_takes_longer_than_the_last_ones_is_left() -> None:
    clock = Clock()
    work = Layers(clock, 8, 0.01)
    table = work.graphs(16)
    table.record_likely(clock.now)
    gaps = Gaps([SimpleNamespace(graphs=table)], clock)  # type: ignore[list-item]
    work.comes = 0.0  # the queue is never empty under load
    for rows in (3, 3, 5, 5):
        table.get(rows)
    gaps.begun(decode_of(3))
    assert work.made == [16, 3]
    clock.now, work.seconds = clock.now + 100, 0.04
    before = clock.now
    gaps.begun(decode_of(3))
    assert work.made == [16, 3] and 0.1 < clock.now - before < 0.15
    clock.now += 100
    gaps.begun(decode_of(3))
    assert work.made == [16, 3]  # it is known now
    assert gaps.idle() and work.made == [16, 3]  # in a pause it is left at once, as somebody waits


def test_the_first_recording_tells_nothing_of_the_next_ones() -> None:
    clock = Clock()
    work = Layers(clock, 4, 2.0)
    table = work.graphs(4)
    table.record_likely(clock.now)
    work.seconds = 0.01
    assert work.looks.seconds == 8.0 and work.looks.stretch == 2.0
    table.record_likely(clock.now + 10)
    assert work.looks.seconds == pytest.approx(0.04) and work.looks.stretch == pytest.approx(0.01)


@pytest.mark.parametrize("captured", [False, True])
def test_a_capture_that_is_left_leaves_nothing_behind(captured: bool) -> None:
    """While warming up or while capturing: the streams are as they were, and the next one is made."""
    cuda = FakeCuda()
    recorder = Recorder(torch.device("cpu"), cuda)
    runs: list[int] = []

    def left() -> None:
        runs.append(1)
        if len(runs) > captured:
            raise Interrupted

    with pytest.raises(Interrupted):
        recorder.record(left)
    if not captured:  # what the side stream was given is behind the next step all the same
        assert " waits for " in cuda.log[-1] and cuda.log[-1].startswith("main")
    assert not cuda.capturing and cuda.current_stream().name == "main"
    graph, found = recorder.record(lambda: "made")
    graph.replay()
    assert found == "made" and cuda.log[-1] == "replay"
