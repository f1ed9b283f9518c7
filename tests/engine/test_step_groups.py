"""Groups of memory through the runner: tables of their own, windows that gave pages back, and a recurrent model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_support import built
from stepping import HOST, Row, Stepper, pool_of, runner_of

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import FROM_DEVICE, Admission, Batch, Embeds, StepOutput
from phloem.core.memory import State
from phloem.core.request import SamplingParams
from phloem.engine.runner import ModelRunner
from phloem.kernels import native
from phloem.kernels.ops import Ops
from phloem.kvcache.pool import KVPool
from phloem.layers.context import BuildContext, ForwardBatch
from phloem.models import load_model
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("gemma3", tmp_path_factory.mktemp("gemma3"))


def windowed(path: Path, ops: Ops | None = None) -> Any:
    return load_model(describe(str(path)), BuildContext(ops or Ops(), torch.float32, CPU))


BACKEND_NAMES = [
    "reference",
    "cpu",
    pytest.param("native", marks=pytest.mark.skipif(not built(), reason="the native library is not built")),
]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8])
def test_pages_that_a_window_gave_back_are_never_read(gemma: Path, backend: str, kv: torch.dtype) -> None:
    """Their places in the table are 0, and the scratch page is full of what no answer may hold."""
    ops = native.table(2) if backend == "native" else Ops()
    if kv == torch.int8 and backend != "native":
        pytest.skip("keeps no such cache")
    model = windowed(gemma, ops)
    window = max(spec.window for spec in model.attention_specs)
    prompt = [5 + (7 * place) % 90 for place in range(3 * window)]
    answers: list[list[int]] = []
    for given_back in (False, True):
        pool = pool_of(model, 2, dtype=kv)
        assert [group.window for group in pool.groups] == [0, window]
        for cache in [store[layer] for layer in pool.groups[1].layers for store in (pool.keys, pool.values)]:
            if kv == torch.int8:
                cache[0] = 127
            else:
                cache[0] = float("nan")
        name = "reference" if backend == "reference" else "cpu"
        runner = runner_of(model, 2, ops, name, pool=pool)
        stepper = Stepper(runner, [Row(prompt, GREEDY), Row(prompt[3:], GREEDY)])
        if given_back:
            tables = stepper._tables

            def without(table: Any, stepper: Any = stepper, tables: Any = tables, runner: Any = runner) -> Any:
                full, part = (one.copy() for one in tables(table))
                for place, row in enumerate(stepper.rows):
                    first = runner.groups[1].first_needed(row.computed)
                    part[place, : first // runner.page_size] = 0
                return full, part

            stepper._tables = without  # type: ignore[method-assign]
        answers += [tokens for tokens in stepper.run(10, lambda place, row: [3, 4] if place else [])]
        runner.close()
    assert answers[:2] == answers[2:]


class Recurrent:
    """Sums what its tokens are, with decay, and answers the sum: one state of a layer, no attention at all."""

    vocab_size, hidden_size, weight_bytes = 97, 4, 0
    attention_specs: list[Any] = []

    def forward(self, step: ForwardBatch) -> torch.Tensor:
        state = step.memory.state(0)
        (sums,) = state.tensors
        before = torch.where(state.fresh[:, None], 0.0, sums[state.reads])
        out, bounds = torch.zeros(len(step.input_ids), 4), state.query_start.tolist()
        for row, (start, end) in enumerate(pairwise(bounds)):
            now = before[row]
            for token in range(start, end):
                now = out[token] = (now * 3 + step.input_ids[token]) % 97
            sums[state.writes[row]] = now
        return out if step.logit_index is None else out[step.logit_index]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden[:, 0].long(), 97).float()

    def greedy(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0].int()

    def best(self, *arguments: Any) -> None:
        return None


def test_a_recurrent_model_reads_and_writes_its_states() -> None:
    pool = KVPool([State((((4,), "float32"),))], [6], 8, torch.float32, CPU)
    backend = BACKENDS.module("reference").Backend(Ops(), [], CPU, torch.float32)
    model: Any = Recurrent()
    runner = ModelRunner(model, backend, pool, Ops(), 2, facts=HOST)
    assert [group.kind for group in runner.groups] == ["state"] and runner.num_pages == (6,)

    def run(step: int, ids: list[list[int]], prefix: list[int], table: list[list[int]], admit: bool) -> StepOutput:
        lens = np.array([len(one) for one in ids], np.int32)
        slots, known = np.arange(2, dtype=np.int32), np.array([1, 2, 3], np.int32)
        entries = [Admission(slot, f"r{slot}", GREEDY, 1, known, 3) for slot in range(2)] if admit else []
        flat = np.array([token for one in ids for token in one], np.int32)
        tables = (np.array(table, np.int32),)
        batch = Batch(step, slots, lens, np.array(prefix, np.int32), flat, tables, slots * 0 + 1, entries)
        return runner.launch(batch).result()

    pool.states[0][0].fill_(50)  # a fresh row reads nothing of it
    assert run(0, [[1, 2], [5]], [0, 0], [[1, 2], [3, 3]], True).tokens.tolist() == [5, 5]
    # Row 0 goes on from state 2 into 4, row 1 in place.
    assert run(1, [[FROM_DEVICE], [FROM_DEVICE]], [2, 1], [[2, 4], [3, 3]], False).tokens.tolist() == [20, 20]
    # What was read stays: both rows go on from row 0's earlier state.
    assert run(2, [[7], [8]], [2, 2], [[2, 1], [2, 5]], False).tokens.tolist() == [22, 23]
    assert pool.states[0][0][:, 0].tolist() == [50, 22, 5, 20, 20, 23]
    runner.close()


def test_rows_that_stand_in_for_embeddings(gemma: Path) -> None:
    """The embeddings of other tokens give what those tokens give."""
    model = windowed(gemma)
    ids, other = np.array([5, 6, 7, 8], np.int32), np.array([5, 60, 70, 8], np.int32)
    rows = model.embed(torch.from_numpy(other[1:3]).long()).numpy()

    def hidden(tokens: Any, embeds: list[Embeds]) -> Any:
        runner = runner_of(model, 1)
        entry = Admission(0, "a", GREEDY, 1, tokens, 4, return_hidden=True)
        one, tables = np.zeros(1, np.int32), tuple(np.ones((1, 1), np.int32) for _ in runner.groups)
        batch = Batch(0, one, one + 4, one, tokens, tables, one + 1, [entry], embeds=embeds)
        found = runner.launch(batch).result().hidden[0]
        runner.close()
        return found

    want = hidden(other, [])
    assert np.array_equal(hidden(ids, [Embeds(1, rows)]), want) and not np.array_equal(hidden(ids, []), want)
