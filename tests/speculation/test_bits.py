"""Steps that verify give the bits of steps of one token, on the CPU's usual table."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_support import built
from stepping import HOST, Row, Stepper, pool_of, runner_of

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import Batch
from phloem.core.request import SamplingParams
from phloem.engine.apart import apart, every_token
from phloem.engine.recorded.decode import DecodeGraphs
from phloem.engine.recorded.flexible import FlexibleSteps
from phloem.kernels import native
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.testing.checkpoints import VOCAB, tiny_checkpoint

CPU = torch.device("cpu")
LENGTH = 24
needs_native = pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")


def rows() -> list[Row]:
    rng = random.Random(1)
    asked = [
        (SamplingParams(temperature=0.0), 3),
        (SamplingParams(temperature=0.8), 120),
        (SamplingParams(temperature=0.0, frequency_penalty=0.3), 190),
    ]
    options: dict[str, Any] = {"return_hidden": True, "return_logprob": True, "top_logprobs": 2}
    return [Row([rng.randrange(4, VOCAB) for _ in range(count)], params, options) for params, count in asked]


def stepper_of(model: Any, ops: Ops, dtype: torch.dtype, recorded: bool, asked: list[Row]) -> Stepper:
    pool = pool_of(model, 3, page=16, dtype=dtype)
    ways: list[Any] = []
    if recorded:
        recorder: Any = None if ops.recorder is None else ops.recorder()
        assert recorder is not None
        backend = BACKENDS.module("cpu").Backend(ops, model.attention_specs, CPU, dtype)
        facts = replace(HOST, patience=1)
        whole = recorder, model, backend, pool, facts
        ways = [DecodeGraphs(*whole, 24, 16), FlexibleSteps(*whole, 512, 24, 16)]
    return Stepper(runner_of(model, 3, ops, "cpu", pool=pool, recorded=ways), asked)


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3"])
def test_rows_of_one_to_eight_have_the_bits_of_one_row_at_a_time(
    family: str, dtype: torch.dtype, recorded: bool, tmp_path: Path
) -> None:
    ops = native.table(2)
    assert ops.row_bits
    model: Any = load_model(describe(str(tiny_checkpoint(family, tmp_path))), BuildContext(ops, torch.float32, CPU))

    def run(drafts: Any) -> Stepper:
        stepper = stepper_of(model, ops, dtype, recorded, rows())
        stepper.run(LENGTH + 8, drafts)
        stepper.runner.close()
        return stepper

    want = run(lambda place, row: [])
    rng = random.Random(2)

    def draft(place: int, row: Row) -> list[int]:
        coming = want.rows[place].tokens[len(row.tokens) :][: rng.randrange(8)]
        return [token if rng.random() < 0.9 else rng.randrange(VOCAB) for token in coming]

    got = run(draft)
    assert got.steps < 0.7 * want.steps
    for a, b in zip(got.rows, want.rows, strict=True):
        assert a.tokens[:LENGTH] == b.tokens[:LENGTH]
        assert all(np.array_equal(x, y) for x, y in zip(a.hidden[:LENGTH], b.hidden[:LENGTH], strict=True))
        assert [one.token for one in a.logprobs[:LENGTH]] == [one.token for one in b.logprobs[:LENGTH]]


@needs_native
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_forced_tokens_have_the_bits_of_decoded_ones(recorded: bool, tmp_path: Path) -> None:
    """As a grammar that jumps forward does: tokens are known before they are computed, with drafts behind or without.
    No penalties: those see sampled tokens alone."""
    ops = native.table(2)
    model: Any = load_model(describe(str(tiny_checkpoint("llama", tmp_path))), BuildContext(ops, torch.float32, CPU))
    want = stepper_of(model, ops, torch.int8, recorded, rows()[:2])
    want.run(4 * LENGTH)
    got, rng = stepper_of(model, ops, torch.int8, recorded, rows()[:2]), random.Random(3)
    while min(len(row.tokens) for row in got.rows) < LENGTH:
        for row, other in zip(got.rows, want.rows, strict=True):
            if row.computed:
                row.tokens += other.tokens[len(row.tokens) :][: rng.choice([0, 0, 2, 5])]
        known = [len(row.tokens) for row in got.rows]
        got.step(lambda place, row: want.rows[place].tokens[len(row.tokens) :][: rng.choice([0, 3])])
        for row, other, at in zip(got.rows, want.rows, known, strict=True):
            count = len(row.tokens) - at
            assert row.tokens == other.tokens[: len(row.tokens)]
            found = zip(row.hidden[-count:], other.hidden[at:], strict=False)
            assert all(np.array_equal(x, y) for x, y in found)
    for stepper in (want, got):
        stepper.runner.close()
    assert got.steps < LENGTH / 2


def test_a_table_that_cannot_promise_it_does_not() -> None:
    assert not Ops().row_bits


def test_tokens_of_answers_stand_apart_and_those_of_prompts_stay() -> None:
    batch = Batch(
        step=0,
        slots=np.array([4, 2, 7], np.int32),
        query_lens=np.array([3, 4, 1], np.int32),
        prefix_lens=np.array([10, 0, 6], np.int32),
        input_ids=np.array([1, 21, 22, 5, 6, 7, 8, 9], np.int32),
        tables=(np.array([[1, 2], [3, 4], [5, 6]], np.int32),),
        outputs=np.array([3, 0, 1], np.int32),
        prompt_targets={1: np.array([6, 7, 8, -1], np.int32)},
    )
    prompts = np.array([10, 6, 3], np.int32)
    found = apart(batch, prompts)
    forced = replace(batch, outputs=np.array([2, 0, 1], np.int32))
    assert apart(forced, prompts).outputs.tolist() == [0, 1, 1, 0, 1]
    begun = apart(batch, np.array([11, 2, 3], np.int32))  # a prompt, and what was forced behind it
    assert begun.query_lens.tolist() == [1, 1, 1, 2, 1, 1, 1] and begun.prefix_lens.tolist() == [10, 11, 12, 0, 2, 3, 6]
    assert [(row, one.tolist()) for row, one in begun.prompt_targets.items()] == [(3, [6, 7]), (4, [8]), (5, [-1])]
    alone = every_token(batch)
    assert alone.prefix_lens.tolist() == [10, 11, 12, 0, 1, 2, 3, 6] and alone.outputs.tolist() == [
        1,
        1,
        1,
        0,
        0,
        0,
        0,
        1,
    ]
    assert found.slots.tolist() == [4, 4, 4, 2, 7] and found.query_lens.tolist() == [1, 1, 1, 4, 1]
    assert found.prefix_lens.tolist() == [10, 11, 12, 0, 6] and found.outputs.tolist() == [1, 1, 1, 0, 1]
    assert found.tables[0].tolist() == [[1, 2]] * 3 + [[3, 4], [5, 6]] and list(found.prompt_targets) == [3]
    assert all(array.dtype == np.int32 for array in (found.query_lens, found.prefix_lens, found.outputs, found.slots))
    assert apart(batch, prompts + 10) is batch
