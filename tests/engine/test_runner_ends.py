"""Runners that end leave nothing behind: graphs, KV pool and weights are freed with the last reference."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stepping import CPU, HOST, pool_of

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import Admission, Batch
from phloem.core.request import SamplingParams
from phloem.engine.recorded.decode import DecodeGraphs
from phloem.engine.recorded.pieces import PieceGraphs
from phloem.engine.runner import ModelRunner
from phloem.kernels.graph import Pieces
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.platforms._facts import StepFacts
from phloem.testing.checkpoints import tiny_checkpoint


class Graph:
    """Stands for a captured graph: it dies with its last reference, and says so."""

    bytes = 0

    def __init__(self, recorder: Any) -> None:
        weakref.finalize(self, recorder.ended.append, recorder.capturing)

    def replay(self, *sizes: int) -> None: ...


class Cut:
    """Notes what runs between pieces. (A class made within a function would be a circle of its own.)"""

    def __init__(self) -> None:
        self.parts: list[Any] = []

    def __call__(self, call: Any, more: bool = True) -> None:
        self.parts.append(call)

    def hold(self, x: Any) -> Any:
        return x


class Recorder:
    """Captures nothing; what the step gave stands as its result. `capturing` while a capture would be open."""

    cuts, resizes = True, False

    def __init__(self, made: list[Any], ended: list[bool]) -> None:
        self.made, self.ended, self.capturing = made, ended, False

    def record(self, fn: Any) -> Any:
        self.capturing = True
        found = fn()
        self.capturing = False
        graph = Graph(self)
        self.made.append(weakref.ref(graph))
        return graph, found

    def record_pieces(self, fn: Any) -> Any:
        cut = Cut()
        found = fn(cut)
        graph = Graph(self)
        self.made.append(weakref.ref(graph))
        return Pieces([graph.replay, *cut.parts], 1, 0), found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def served(path: Path, recorder: Recorder, facts: StepFacts) -> tuple[ModelRunner, list[weakref.ref[Any]]]:
    """A runner that has decoded, with all its graphs, and what must go with it."""
    model: Any = load_model(describe(str(path)), BuildContext(Ops(), torch.float32, CPU))
    pool = pool_of(model, 2)
    backend = BACKENDS.module("reference").Backend(Ops(), model.attention_specs, CPU, torch.float32)
    whole: Any = (recorder, model, backend, pool)
    ways: list[Any] = [DecodeGraphs(*whole, facts, 2, 4), PieceGraphs(*whole, 8, inline=not facts.records_idle)]
    with torch.inference_mode():
        for way in ways:
            way.graphs.record_all()
    runner = ModelRunner(model, backend, pool, Ops(), 2, facts=facts, recorded=ways)
    ones = np.ones(1, np.int32)
    for number in range(3):
        new = [Admission(0, "r", SamplingParams(temperature=0.0), 1, ones, 0)] if number == 0 else []
        prefix = np.full(1, number, np.int32)
        table = (np.arange(1, 5, dtype=np.int32).reshape(1, 4),)
        batch = Batch(number, np.zeros(1, np.int32), ones, prefix, ones, table, ones, admissions=new)
        runner.launch(batch).result()
    kept = [weakref.ref(one) for one in (runner, runner._work, runner._steps, model, pool, *ways, ways[0].graphs)]
    return runner, kept


@pytest.mark.slow
@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("facts", [HOST, StepFacts(records_idle=True)], ids=["host", "device"])
def test_a_closed_runner_is_freed_by_its_last_reference(path: Path, facts: StepFacts) -> None:
    made: list[Any] = []
    runner, kept = served(path, Recorder(made, []), facts)
    assert made and all(graph() is not None for graph in made)
    runner.close()
    del runner
    assert [graph() for graph in made] == [None] * len(made)
    assert [one() for one in kept] == [None] * len(kept)


@pytest.mark.slow
@pytest.mark.usefixtures("without_collector")
def test_runners_that_end_while_another_captures_take_no_part_in_it(path: Path) -> None:
    made: list[Any] = []
    ended: list[bool] = []
    recorder = Recorder(made, ended)
    runners = [served(path, Recorder(made, ended), StepFacts(records_idle=True))[0] for _ in range(2)]
    before = len(made)

    def capture() -> None:
        assert recorder.capturing and not ended
        [[[i]] for i in range(2000)]  # what would set the collector off, were it on
        assert not ended

    for runner in runners:
        runner.close()
    runner = None  # pyright: ignore[reportAssignmentType] - its name held the last one
    runners.clear()
    assert len(ended) == before and all(graph() is None for graph in made)
    ended.clear()
    kept = recorder.record(capture)
    assert not ended and kept[0].bytes == 0
