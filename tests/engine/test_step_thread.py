"""Steps in flight: the order of begin and land, and the engine's runner with values that arrive late."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stepping import HOST, bits, runner_of

from phloem.checkpoint.describe import describe
from phloem.core.batch import FROM_DEVICE, Admission, Batch, StepOutput
from phloem.core.request import SamplingParams
from phloem.engine import pipeline as pipeline_file
from phloem.engine.pipeline import Between, Flight, Pipeline
from phloem.engine.transfer import plain_into
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import Model, load_model
from phloem.platforms._facts import StepFacts
from phloem.platforms._streams import Arriving
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")


class Answer:
    def __init__(self, log: list[str], name: Any) -> None:
        self.log, self.name = log, name

    def set(self, output: Any) -> None:
        self.log.append(f"answer {self.name}")

    def fail(self, error: BaseException) -> None:
        self.log.append(f"fail {self.name}: {error}")


def fly(batches: list[Any], ready: bool, needs: Any = lambda batch: False, broken: str = "") -> list[str]:
    log: list[str] = []

    def begin(batch: Any, _: Any = None) -> Flight:
        log.append(f"begin {batch}")
        if broken == f"begin {batch}":
            raise ValueError("no")

        def land() -> Any:
            log.append(f"land {batch}")
            if broken == f"land {batch}":
                raise ValueError("no")
            return batch

        return Flight(land, lambda: ready)

    source: Any = queue.SimpleQueue()
    for batch in batches:
        source.put((batch, Answer(log, batch)))
    source.put(None)
    pipeline = Pipeline(begin, needs)
    pipeline.run(source)
    assert pipeline.busy_since == 0.0
    return log


def test_the_next_step_begins_before_the_last_one_lands() -> None:
    log = fly([1, 2, 3], ready=False)
    assert log == [
        *("begin 1", "begin 2", "land 1", "answer 1"),
        *("begin 3", "land 2", "answer 2", "land 3", "answer 3"),
    ]


def test_a_step_that_has_ended_lands_at_once() -> None:
    log = fly([1, 2], ready=True)
    assert log == ["begin 1", "land 1", "answer 1", "begin 2", "land 2", "answer 2"]


def test_a_step_that_needs_the_tokens_waits_for_them() -> None:
    log = fly([1, 2, 3], ready=False, needs=lambda batch: batch == 2)
    assert log[:4] == ["begin 1", "land 1", "answer 1", "begin 2"]
    assert log[4:6] == ["begin 3", "land 2"]


def settling(broken: str = "") -> list[str]:
    """As on a CPU: `begin` computes, and answers for the step before it just before that."""
    log: list[str] = []
    source: Any = queue.SimpleQueue()

    def begin(batch: Any, _: Any = None) -> Flight:
        log.append(f"prepare {batch}")
        if broken == f"prepare {batch}":
            raise ValueError("no")
        pipeline.settle()
        assert pipeline.busy_since > 0
        if broken == f"compute {batch}":
            raise ValueError("no")
        log.append(f"compute {batch}")
        if batch == 2:  # only now does another one come, and then no more
            source.put((3, Answer(log, 3)))
        return Flight(lambda: batch, lambda: True)

    pipeline = Pipeline(begin, lambda batch: False, settles=True)
    for batch in (1, 2):
        source.put((batch, Answer(log, batch)))
    thread = threading.Thread(target=pipeline.run, args=(source,))
    thread.start()
    deadline = time.monotonic() + 20
    ended = ("answer 3", "fail 2: no")
    while not (log and log[-1] in ended) and len(log) < 9 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert pipeline.busy_since == 0
    source.put(None)
    thread.join(20)
    return log


def test_a_step_that_has_ended_is_answered_when_the_next_one_computes() -> None:
    assert settling() == [
        *("prepare 1", "compute 1", "prepare 2", "answer 1", "compute 2"),
        *("prepare 3", "answer 2", "compute 3", "answer 3"),
    ]


@pytest.mark.parametrize("broken", ["prepare 2", "compute 2"])
def test_a_step_that_fails_before_it_computes_leaves_the_one_before_it_whole(broken: str) -> None:
    lines = [line for line in settling(broken) if line.startswith(("answer", "fail"))]
    assert lines == ["answer 1", "fail 2: no"]


@pytest.mark.parametrize("broken", ["begin 2", "land 2"])
def test_one_failing_step_fails_alone_and_in_order(broken: str) -> None:
    log = fly([1, 2, 3], ready=False, broken=broken)
    assert [line for line in log if line.startswith(("answer", "fail"))] == ["answer 1", "fail 2: no", "answer 3"]


def test_the_last_step_lands_without_a_next_one() -> None:
    ended = threading.Event()
    log: list[str] = []
    source: Any = queue.SimpleQueue()
    pipeline = Pipeline(lambda batch, _: Flight(lambda: batch, ended.is_set), lambda batch: False)
    thread = threading.Thread(target=pipeline.run, args=(source,))
    thread.start()
    source.put((1, Answer(log, 1)))
    time.sleep(0.05)
    assert log == [] and pipeline.busy_since > 0
    ended.set()
    deadline = time.monotonic() + 20
    while not log and time.monotonic() < deadline:
        time.sleep(0.001)
    assert log == ["answer 1"]
    source.put(None)
    thread.join(20)
    assert not thread.is_alive()


class LateStreams:
    """Copies that have not ended when one asks, but for the last of `total`; notes how many steps had begun since."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.sent = 0
        self.ahead: list[int] = []

    def up(self, arrays: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(np.array(array)) for array in arrays]

    def into(self, target: torch.Tensor, parts: Any) -> None:
        plain_into(target, parts)

    def down(self, tensors: Any) -> Arriving:
        self.sent += 1
        number, host = self.sent, [tensor.clone() for tensor in tensors]

        class Event:
            def query(event) -> bool:
                return number == self.total

            def synchronize(event) -> None:
                self.ahead.append(self.sent - number)

        return Arriving(host, Event())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return load_model(describe(str(path)), BuildContext(Ops(), torch.float32, CPU))


def generate(
    model: Model, params: list[SamplingParams], steps: int, streams: Any, follow: Any = None
) -> list[list[int]]:
    """Prefill all rows in one step, then decode `steps` times with tokens that only the device knows."""
    rows = len(params)
    runner = runner_of(model, rows, streams=streams, facts=HOST if streams is None else StepFacts())
    table = (np.arange(rows * 8) + 1).reshape(rows, 8).astype(np.int32)
    prompts = [np.arange(5 + row, dtype=np.int32) + 10 for row in range(rows)]
    admissions = [
        Admission(row, f"r{row}", params[row], 7 + row, prompts[row], len(prompts[row]), constrained=follow is not None)
        for row in range(rows)
    ]
    for row in range(rows if follow is not None else 0):
        runner.constrain(row, follow(row))
    lens = np.array([len(prompt) for prompt in prompts], np.int32)
    slots, every = np.arange(rows, dtype=np.int32), np.ones(rows, np.int32)
    pending = [runner.launch(Batch(0, slots, lens, lens * 0, np.concatenate(prompts), (table,), every, admissions))]
    for step in range(steps):
        ids = np.full(rows, FROM_DEVICE, np.int32)
        pending.append(runner.launch(Batch(step + 1, slots, lens * 0 + 1, lens + step, ids, (table,), every)))
    outputs: list[StepOutput] = [one.result() for one in pending]
    runner.close()
    assert [output.step for output in outputs] == list(range(steps + 1)) and not any(o.failed for o in outputs)
    return np.stack([output.tokens for output in outputs], 1).tolist()


PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.7),
    SamplingParams(temperature=1.3, top_k=20, presence_penalty=1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("params", [PARAMS, [PARAMS[0]] * 3], ids=["mixed", "greedy"])
def test_late_values_change_no_token(model: Model, params: list[SamplingParams]) -> None:
    late = LateStreams(13)
    assert generate(model, params, 12, late) == generate(model, params, 12, None)
    assert late.ahead[:-1] == [1] * 12 and late.ahead[-1] == 0


def test_grammar_masks_see_every_token_in_time(model: Model) -> None:
    """Each row may only continue with the successor of its last token: a mask one step late would break the chain."""

    class Successor:
        def __init__(self, row: int) -> None:
            self.last = 100 + row

        def masks(self, sampled: Any, drafts: Any) -> Any:
            self.last = [self.last, *sampled][-1]
            return [bits(self.last + 1, words=12)]

    late = LateStreams(7)
    got = generate(model, [PARAMS[0], PARAMS[1]], 6, late, Successor)
    assert got == [list(range(101, 108)), list(range(102, 109))]
    assert set(late.ahead) == {0}


def test_idle_time_is_used_until_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_file, "IDLE_SECONDS", 0.01)
    log: list[str] = []
    source: Any = queue.SimpleQueue()
    done = threading.Event()

    def idle() -> bool:
        log.append("idle")
        if log.count("idle") == 3:
            done.set()
        return log.count("idle") < 3

    pipeline = Pipeline(lambda batch, _: Flight(lambda: batch, lambda: True), lambda batch: False, idle)
    thread = threading.Thread(target=pipeline.run, args=(source,))
    thread.start()
    assert done.wait(20)
    time.sleep(0.05)
    source.put((1, Answer(log, 1)))
    source.put(None)
    thread.join(20)
    assert log == ["idle", "idle", "idle", "answer 1"]


def test_work_between_steps_runs_with_none_in_flight_and_fails_alone() -> None:
    log: list[str] = []
    source: Any = queue.SimpleQueue()

    def begin(batch: Any, _: Any = None) -> Flight:
        log.append(f"begin {batch}")
        return Flight(lambda: log.append(f"land {batch}"), lambda: False)  # type: ignore[arg-type, return-value]

    def fails() -> None:
        log.append("work")
        raise MemoryError("no")

    source.put((1, Answer(log, 1)))
    source.put((2, Answer(log, 2)))
    source.put(Between(fails, Answer(log, "work")))
    source.put(Between(lambda: log.append("more"), Answer(log, "more")))
    source.put((3, Answer(log, 3)))
    source.put(None)
    Pipeline(begin, lambda batch: False).run(source)
    assert log == [
        *("begin 1", "begin 2", "land 1", "answer 1", "land 2", "answer 2"),
        *("work", "fail work: no", "more", "answer more", "begin 3", "land 3", "answer 3"),
    ]


def test_the_runner_gives_what_the_work_gave_in_its_own_thread(model: Model) -> None:
    runner = runner_of(model, 2)
    assert runner.between(lambda: threading.current_thread().name).result() == "phloem-runner"
    assert runner.between(lambda: None).result() is None
    with pytest.raises(ZeroDivisionError):
        runner.between(lambda: 1 // 0).result()
    pending = runner.between(lambda: torch.is_inference_mode_enabled())
    assert pending.result() and pending.done()
    runner.close()


def test_who_follows_a_slot_is_not_seen_by_an_earlier_step(model: Model) -> None:
    """The next request of a slot is handed over while steps of the one before it wait in the queue."""

    class Only:
        def __init__(self, token: int) -> None:
            self.token, self.heard = token, list[int]()

        def masks(self, sampled: Any, drafts: Any) -> Any:
            self.heard += sampled
            return [bits(self.token, words=12)]

    runner = runner_of(model, 2)
    gate = threading.Event()
    held = runner.between(lambda: gate.wait(20))
    ones, prompt = np.ones(1, np.int32), np.array([5, 6, 7], np.int32)
    table = np.arange(1, 9, dtype=np.int32)[None]

    def batch(step: int, admit: bool, constrained: bool = True) -> Batch:
        entry = Admission(0, "a", SamplingParams(temperature=0.0), 1, prompt, 3, constrained=constrained)
        start = 0 if admit else 2 + step % 10
        ids = prompt if admit else np.array([FROM_DEVICE], np.int32)
        return Batch(step, ones * 0, ones * len(ids), ones * start, ids, (table,), ones, [entry] if admit else [])

    first, second = Only(40), Only(50)
    runner.constrain(0, first)
    pending = [runner.launch(batch(0, True)), runner.launch(batch(1, False))]
    runner.constrain(0, second)
    pending.append(runner.launch(batch(2, False)))  # does not admit: still the first one's
    pending += [runner.launch(batch(10, True)), runner.launch(batch(11, False))]
    runner.constrain(0, None)
    pending.append(runner.launch(batch(12, False)))
    gate.set()
    tokens = [one.result().tokens.tolist() for one in pending]
    assert held.result() and tokens[:5] == [[40], [40], [40], [50], [50]] and tokens[5] != [50]
    assert first.heard == [40, 40] and second.heard == [50]
    with pytest.raises(ValueError, match="nothing was given that follows"):
        runner.launch(batch(20, True)).result()
    assert runner.launch(batch(30, True, constrained=False)).result().counts.tolist() == [1]
    runner.close()
