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
from phloem.engine.apart import apart
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
        pool = pool_of(model, 3, page=16, dtype=dtype)
        ways: list[Any] = []
        if recorded:
            recorder: Any = None if ops.recorder is None else ops.recorder()
            assert recorder is not None
            backend = BACKENDS.module("cpu").Backend(ops, model.attention_specs, CPU, dtype)
            facts = replace(HOST, patience=1)
            whole = recorder, model, backend, pool, facts
            ways = [DecodeGraphs(*whole, 24, 16), FlexibleSteps(*whole, 512, 24, 16)]
        stepper = Stepper(runner_of(model, 3, ops, "cpu", pool=pool, recorded=ways), rows())
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


def test_a_table_that_cannot_promise_it_does_not() -> None:
    assert not Ops().row_bits


def test_verifying_rows_stand_apart_and_others_stay() -> None:
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
    found = apart(batch)
    forced = replace(batch, outputs=np.array([2, 0, 1], np.int32))
    assert apart(forced).query_lens.tolist() == [2, 1, 4, 1] and apart(forced).prefix_lens.tolist() == [10, 12, 0, 6]
    assert found.slots.tolist() == [4, 4, 4, 2, 7] and found.query_lens.tolist() == [1, 1, 1, 4, 1]
    assert found.prefix_lens.tolist() == [10, 11, 12, 0, 6] and found.outputs.tolist() == [1, 1, 1, 0, 1]
    assert found.tables[0].tolist() == [[1, 2]] * 3 + [[3, 4], [5, 6]] and list(found.prompt_targets) == [3]
    assert all(array.dtype == np.int32 for array in (found.query_lens, found.prefix_lens, found.outputs, found.slots))
    alone = replace(batch, outputs=np.array([1, 0, 1], np.int32))
    assert apart(alone) is alone
