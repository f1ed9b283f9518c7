"""Drafts of a model beside the host: the passes follow one another on the device, and are waited for once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pools import pool_for

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import Batch, Drafting
from phloem.core.config import Config
from phloem.core.memory import Paged
from phloem.core.resolve import Decision
from phloem.engine.drafts import beside
from phloem.engine.drafts.drafting import DraftWork, Loaded
from phloem.engine.transfer import LastTokens
from phloem.kernels import reference_attention
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.platforms._facts import StepFacts
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")
READS = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__index__")


class Model:
    """Drafts follow from the last token that was read and its position."""

    attention_specs: list[Any] = []
    memory: list[Any] = []
    hidden_size = 2
    weight_bytes = 0

    def greedy(self, hidden_LN: torch.Tensor) -> torch.Tensor:
        return (7 * hidden_LN[:, 0] + hidden_LN[:, 1] + 3).long() % 101


class Forward:
    """Hidden states are the tokens and their positions. As of a recording, its result is overwritten by the next."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._out = torch.zeros(64, 2)

    def run(self, step: Any, ready: Any) -> torch.Tensor:
        inputs = step.inputs
        both = torch.stack([inputs.input_ids.float(), inputs.positions.float()], 1)[inputs.logit_index]
        self.sizes.append(len(inputs.input_ids))
        out = self._out[: len(both)]
        out.copy_(both)
        return out


def batch_of(counts: list[int], lens: list[int], known: int = 9) -> Batch:
    rows = len(counts)
    ids = np.arange(20, 20 + sum(lens), dtype=np.int32)
    starts = np.array([known - length for length in lens], np.int32)
    plan = Drafting(np.array(counts, np.int32), starts, np.array(lens, np.int32), ids)
    return Batch(
        5, np.arange(rows, dtype=np.int32)[::-1].copy(), np.ones(rows, np.int32), np.full(rows, known - 1, np.int32),
        np.arange(50, 50 + rows, dtype=np.int32), (np.arange(1, 1 + 4 * rows, dtype=np.int32).reshape(rows, 4),),
        np.ones(rows, np.int32), drafts=np.array(counts, np.int32), drafting=plan,
    )  # fmt: skip


def work(on_host: bool, forward: Forward) -> tuple[DraftWork, LastTokens]:
    pool = pool_for([Paged(1, 4, 4)], 40, 4, torch.float32, CPU)
    last = LastTokens(4, CPU, on_host, None, drafts=8)
    slots: Any = SimpleNamespace(columns=SimpleNamespace(greedy=np.ones(4, bool)))
    loaded: Any = SimpleNamespace(model=Model(), carries=False)
    return DraftWork(loaded, forward, Ops(), pool, slots, last), last  # type: ignore[arg-type]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("counts", "lens"),
    [([5], [1]), ([3, 1, 4], [2, 1, 3]), ([0, 2], [4, 1]), ([1, 1], [1, 1]), ([2, 0, 0], [1, 0, 5])],
)
def test_drafts_are_those_of_the_host_and_waited_for_once_or_not_at_all(
    counts: list[int], lens: list[int], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(counts, lens)
    there, here = Forward(), Forward()
    wanted, _ = work(True, here)[0].run(batch)
    device, last = work(False, there)
    last.values.fill_(77)
    waits: Counter[str] = Counter()
    for name in READS:
        real = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, real: Any = real, name: str = name) -> Any:
            waits[name] += 1
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    found, _ = device.run(batch, late)
    monkeypatch.undo()
    assert waits == ({} if late else {"tolist": 1})
    assert there.sizes == here.sizes and len(there.sizes) >= max(counts)
    assert ((found.input_ids < 0).sum() == sum(counts)) if late else (found.input_ids >= 0).all()
    assert last.known(found).tolist() == wanted.input_ids.tolist() and found.outputs.tolist() == wanted.outputs.tolist()
    assert found.query_lens.tolist() == [1 + count for count in counts] and found.drafting is None
    assert (last.values[:4] == 77).all()  # the last tokens of the slots are the model's, not the drafts


def test_nothing_to_read_is_nothing_to_wait_for() -> None:
    batch = batch_of([0, 0], [0, 0])
    found, _ = work(False, Forward())[0].run(batch)
    assert found.input_ids.tolist() == batch.input_ids.tolist() and found.drafting is None


class Graph:
    bytes = 10

    def __init__(self, recorder: Recorder, fn: Any, out: torch.Tensor) -> None:
        self._recorder, self._fn, self._out = recorder, fn, out

    def replay(self, *sizes: int) -> None:
        self._recorder.replays += 1
        self._out.copy_(self._fn())


class Recorder:
    cuts = resizes = False
    replays = 0

    def record(self, fn: Any) -> tuple[Graph, torch.Tensor]:
        out = torch.zeros_like(fn())
        return Graph(self, fn, out), out


def kernel(*args: Any) -> torch.Tensor:
    """Attention that no backend takes for the reference's, which reads lengths on the host."""
    return reference_attention.paged_attention(*args)


@pytest.mark.parametrize("shares", [1000, 0])
def test_passes_of_a_model_that_drafts_are_recorded_on_a_device(tmp_path: Path, shares: int) -> None:
    """Before the engine is ready and within their share of the memory; they draft what eager passes draft."""
    pytest.importorskip("transformers")
    recorder = Recorder()
    ops = replace(Ops(), paged_attention=kernel, recorder=lambda: recorder)
    found: list[Any] = []
    for on_device in (True, False):
        model: Any = load_model(
            describe(str(tiny_checkpoint("llama", tmp_path))), BuildContext(ops, torch.float32, CPU)
        )
        pool = pool_for([*model.memory, *model.memory], 40, 4, torch.float32, CPU)
        first = len(model.memory)
        loaded = Loaded(model, first, False, Decision("speculative_draft", "draft_model", ""))
        platform: Any = SimpleNamespace(facts=StepFacts(records_idle=True), memory=lambda: (1 << 20, 1 << 20))
        backend = BACKENDS.get("reference")(ops, model.attention_specs, CPU, torch.float32)
        sizes = 4, 8, 16, "" if on_device else "eagerly, to compare"
        decisions: list[Decision] = []
        place = beside.Place(Config(), platform, backend, pool, ops, *sizes, None, shares)
        prepared = beside.prepare(loaded, place, decisions)
        assert prepared is not None
        slots: Any = SimpleNamespace(columns=SimpleNamespace(greedy=np.ones(4, bool)))
        with torch.inference_mode():
            last = LastTokens(4, CPU, False, None, drafts=8)
            made = prepared.make(slots, last).run(batch_of([3, 2, 3], [1, 4, 1]))[0]
        found.append((made.input_ids.tolist(), prepared.recorded, [d.name for d in decisions]))
    (drafts, ways, names), (wanted, none, _) = found
    assert drafts == wanted and not none
    (way,) = ways
    assert ("draft_step_graphs" in names) and way.graphs.facts()["recorded"] == (4 if shares else 0)
    assert (recorder.replays == 2) == bool(shares)  # the second and the third pass, whose rows have one token each
