"""Drafts beside recurrent layers: states that took in what was refused are made anew, so answers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_support import built

import phloem
from phloem.core.batch import Batch
from phloem.engine.replay import again
from phloem.engine.wanted import Wanted
from phloem.testing.checkpoints import tiny_checkpoint

SCHEMA = '{"type": "array", "items": {"enum": ["ab", "ac"]}, "minItems": 3, "maxItems": 5}'
WORDS = "the dog a page table the dog a page token " * 4
# Little memory: requests are preempted, and their states are made anew.
TIGHT: dict[str, Any] = {
    "dtype": "float32",
    "threads": 1,
    "kv_cache_dtype": "auto",
    "max_total_tokens": 320,
    "max_running_requests": 3,
    "chunked_prefill_size": 24,
    "random_seed": 5,
    "debug_invariants": True,
}
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.3, "sampling_seed": 3},
    {"temperature": 1.0, "sampling_seed": 4, "top_p": 0.5},
    {"temperature": 0.0, "frequency_penalty": 0.5},
    {"temperature": 0.8, "sampling_seed": 2, "json_schema": SCHEMA},
    {"temperature": 0.0, "min_new_tokens": 6, "stop": ["page"]},
]


def answers(path: Path, ops: str, **more: Any) -> list[Any]:
    prompts = [WORDS, WORDS[3:], "page", WORDS[:40], "a", WORDS]
    params = [{"max_new_tokens": 40, **one} for one in PARAMS]
    with phloem.Engine(model_path=str(path), ops=ops, **TIGHT, **more) as engine:
        first: Any = engine.generate(prompts, params, return_logprob=True)
        # Once more, with the same prompts in the cache.
        second: Any = engine.generate(prompts, params, return_logprob=True)
    return [*first, *second]


@pytest.mark.some(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ops"),
    [
        ("mamba2", "reference"),
        *(
            pytest.param(family, "native", marks=pytest.mark.skipif(not built(), reason="not built"))
            for family in ("qwen3_next", "mamba2", "lfm2")
        ),
    ],
)
def test_answers_beside_recurrent_layers_are_those_of_plain_decoding(tmp_path: Path, family: str, ops: str) -> None:
    path = tiny_checkpoint(family, tmp_path)
    want = answers(path, ops, speculative_algorithm="none")
    got = answers(path, ops, speculative_algorithm="suffix", disable_speculative_adaptive=True)
    for one, other in zip(got, want, strict=True):
        assert one["output_ids"] == other["output_ids"]
        pairs = zip(one["meta_info"]["output_token_logprobs"], other["meta_info"]["output_token_logprobs"], strict=True)
        assert all(abs(mine[0] - theirs[0]) < 1e-4 for mine, theirs in pairs)
    told = [one["meta_info"] for one in got]
    proposed = sum(one["spec_num_proposed_drafts"] for one in told)
    assert 0 < sum(one["spec_num_correct_drafts"] for one in told) < proposed, "some are right, some are refused"


def test_rows_run_again_without_what_was_refused() -> None:
    """Three rows: two of three drafts right; all right; a chunk of two tokens with a refused draft behind them."""
    batch = Batch(
        7,
        np.array([4, 1, 2], np.int32),
        np.array([4, 2, 3], np.int32),
        np.array([10, 20, 30], np.int32),
        np.array([1, 2, 3, 9, 5, 6, 7, 8, 9], np.int32),
        (np.array([[1, 2], [3, 4], [5, 6]], np.int32),),
        np.array([4, 2, 2], np.int32),
    )
    wanted = Wanted.of(batch)
    rows = again(batch, wanted, np.array([2, 3, 4, 0, 6, 0, 1, 2]))
    assert rows is not None
    assert rows.slots.tolist() == [4, 2]
    assert rows.query_lens.tolist() == [3, 2]
    assert rows.prefix_lens.tolist() == [10, 30]
    assert rows.input_ids.tolist() == [1, 2, 3, 7, 8]
    assert rows.tables[0].tolist() == [[1, 2], [5, 6]]
    assert rows.outputs.tolist() == [0, 0]
    assert again(batch, wanted, np.array([2, 3, 9, 0, 6, 0, 9, 2])) is None
