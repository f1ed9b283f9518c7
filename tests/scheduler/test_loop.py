"""The loop: plain or overlapped, with signs of life, until a drain or the end of the door."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from phloem.core.late import Prepared
from phloem.core.messages import Drain, FromEngine, Heartbeat, Stopped, Submit, ToEngine, Tokens, pack_ids
from phloem.core.request import SamplingParams
from phloem.kvcache.manager import CacheManager
from phloem.scheduler import loop
from phloem.scheduler.scheduler import Scheduler, ScheduleSettings
from phloem.testing.driver import Unfold
from phloem.testing.fake_runner import FakeRunner, oracle


class Box:
    """An inbox over a queue; counts how often an idle loop woke up."""

    def __init__(self) -> None:
        self.queue: queue.Queue[ToEngine | None] = queue.Queue()
        self.polls = 0

    def poll(self, timeout: float | None) -> list[ToEngine]:
        self.polls += 1
        found: list[ToEngine] = []
        try:
            item = self.queue.get_nowait() if timeout == 0.0 else self.queue.get(timeout=timeout)
            while True:
                if item is None:
                    raise loop.InboxClosed
                found.append(item)
                item = self.queue.get_nowait()
        except queue.Empty:
            return found


class Running:
    """A loop in a thread."""

    def __init__(self, overlap: bool = True, delay: float = 0.0) -> None:
        self.box, self.sent, self.beats = Box(), queue.Queue[FromEngine](), list[Heartbeat]()
        self.runner = FakeRunner(200, 4, 8, delay=delay)
        self.unfold = Unfold()
        settings = ScheduleSettings(8, 1000, 1000, overlap=overlap, debug_invariants=True)
        self.scheduler = Scheduler(
            self.runner, settings, CacheManager(self.runner.groups, self.runner.num_pages, 4), self.sent.put
        )
        self.thread = threading.Thread(target=loop.run, args=(self.scheduler, self.box, self.beats.append), daemon=True)
        self.thread.start()

    def submit(self, name: str, count: int) -> None:
        sampling = SamplingParams(max_new_tokens=count, sampling_seed=0, ignore_eos=True)
        self.box.queue.put(Submit(id=name, input_ids=pack_ids([11, 12, 13]), sampling=sampling))

    def answer(self, name: str) -> list[int]:
        tokens: list[int] = []
        while True:
            message = self.sent.get(timeout=10)
            if not isinstance(message, Tokens):
                continue
            for chunk in self.unfold.chunks(message):
                if chunk.id == name:
                    tokens += chunk.tokens
                    if chunk.finish is not None:
                        return tokens

    def drain(self, timeout: float = 10.0) -> list[FromEngine]:
        self.box.queue.put(Drain(timeout=timeout))
        self.thread.join(10)
        assert not self.thread.is_alive()
        return list(self.sent.queue)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_serves_and_drains(overlap: bool) -> None:
    engine = Running(overlap)
    engine.submit("a", 20)
    assert engine.answer("a") == oracle([11, 12, 13], 0, 20, 1000)
    engine.submit("b", 20)
    rest = engine.drain()
    assert isinstance(rest[-1], Stopped)
    chunks = [chunk for message in rest if isinstance(message, Tokens) for chunk in engine.unfold.chunks(message)]
    made = [token for chunk in chunks if chunk.id == "b" for token in chunk.tokens]
    assert made == oracle([11, 12, 13], 0, 20, 1000)


@pytest.mark.slow
def test_an_idle_loop_sleeps() -> None:
    engine = Running()
    time.sleep(0.3)
    polls = engine.box.polls
    time.sleep(0.3)
    assert engine.box.polls - polls <= 2
    engine.drain()


@pytest.mark.slow
def test_beats_come_between_steps_and_never_while_one_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "BEAT_SECONDS", 0.05)
    engine = Running(overlap=True, delay=0.02)
    engine.submit("a", 15)
    engine.answer("a")
    assert len(engine.beats) >= 3 and any(beat.busy_seconds > 0 for beat in engine.beats)
    engine.runner.delay = 0.6
    engine.submit("b", 2)
    time.sleep(0.15)
    before = len(engine.beats)
    time.sleep(0.3)
    assert len(engine.beats) == before, "a beat while a step hung"
    engine.answer("b")
    time.sleep(0.2)
    assert len(engine.beats) > before and engine.beats[-1].busy_seconds == 0
    assert any(isinstance(message, Heartbeat) for message in engine.drain())


@pytest.mark.slow
def test_overlap_hides_the_host_behind_the_step() -> None:
    def turn(overlap: bool) -> float:
        engine = Running(overlap, delay=0.01)
        slow = engine.scheduler.planner.next_batch

        def next_batch() -> object:
            time.sleep(0.01)
            return slow()

        engine.scheduler.planner.next_batch = next_batch  # type: ignore[method-assign,assignment]
        begin = time.monotonic()
        engine.submit("a", 20)
        engine.answer("a")
        engine.drain()
        return time.monotonic() - begin

    plain, overlapped = turn(False), turn(True)
    assert plain >= 0.4 and overlapped < 0.8 * plain


def test_when_the_door_has_gone_the_loop_ends() -> None:
    engine = Running()
    engine.submit("a", 500)
    engine.box.queue.put(None)
    engine.thread.join(10)
    assert not engine.thread.is_alive() and not engine.scheduler.live


def test_a_late_request_does_not_need_a_message_to_start() -> None:
    class Soon:
        error = None

        def __init__(self) -> None:
            self.at = time.monotonic() + 0.05

        def ready(self) -> bool:
            return time.monotonic() >= self.at

    engine = Running()
    engine.scheduler.prepare = lambda submit, prompt: Prepared((Soon(),))
    engine.submit("a", 3)
    assert engine.answer("a") == oracle([11, 12, 13], 0, 3, 1000)
    engine.drain()
