"""Several batches that decode on their way through the stages of a pipeline, and what they answer."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loads import answers, load
from share_support import ThreadRanks, checkpoint, planned

from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.messages import Submit, pack_ids
from phloem.core.request import SamplingParams
from phloem.engine.ranks import stages
from phloem.engine.ranks.parallel import Chosen, Go, ranks_of
from phloem.launch.core import EngineCore
from phloem.scheduler.chunks import Price

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "ops": "reference", "page_size": 8, "context_length": 128, "chunked_prefill_size": 16,
    "max_running_requests": 4, "max_total_tokens": 160, "debug_invariants": True, "random_seed": 1, "threads": 1,
    "log_level": "warning",
}  # fmt: skip

GROUPS = {"pp_size": 2, "tp_size": 2, "attn_dp_size": 2}


def served(path: str, submits: list[Submit], **sizes: Any) -> tuple[dict[str, Any], list[Any]]:
    """Answers, and what ranks were told."""
    config = Config.from_flat({"model_path": path, **OPTIONS, **sizes})
    ranks = ThreadRanks(config, describe(path)) if ranks_of(config) > 1 else None
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    try:
        return answers(core, submits), [] if ranks is None else ranks.told
    finally:
        core.close()


@pytest.mark.some(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {"pp_size": 2}),
        ("llama", {"pp_size": 3}),
        ("qwen3_moe", {"pp_size": 2, "tp_size": 2}),
        ("gemma3_text", {"pp_size": 2}),
        ("qwen3_next", {"pp_size": 2}),
        ("llama", {"pp_size": 2, "max_total_tokens": 96}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(size) for size in value.values()),
)
def test_waves_answer_as_one_rank_does(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """With prefix hits, chunks, preemption, grammars, penalties and log probabilities."""
    path = str(checkpoint(name, tmp_path))
    expected, _ = served(path, load())
    found, told = served(path, load(), **sizes)
    for key, (ids, values, prompt) in expected.items():
        assert found[key][0] == ids and len(ids) > 3, key
        assert found[key][1] == pytest.approx(values, abs=1e-4), key
        assert found[key][2] == pytest.approx(prompt, abs=1e-4, nan_ok=True), key
    heads = [one.head for one in told if isinstance(one, Go)]
    assert heads.count("greedy") > 3 and heads.count("logits") > 3
    assert any(isinstance(one, Chosen) for one in told), "log probabilities of prompts are asked for apart"


def many(rows: int, count: int) -> list[Submit]:
    sampling = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
    prompts = [np.arange(5 + row, 12 + 2 * row).tolist() for row in range(rows)]
    return [Submit(id=f"q{row}", input_ids=pack_ids(prompt), sampling=sampling) for row, prompt in enumerate(prompts)]


def watched(monkeypatch: pytest.MonkeyPatch, most: int) -> list[bool]:
    """The second of two stages waits in each of so many steps until the first one has begun the next: whether it had,
    of each."""
    begun, changed, together = [0, 0], threading.Condition(), list[bool]()
    run_stage = stages.run_stage

    def meeting(model: Any, stage: Any, step: Any, given: Any) -> Any:
        place = stage.axis.rank
        with changed:
            begun[place] += 1
            mine = begun[place]
            changed.notify_all()
            if place and len(together) < most:
                together.append(changed.wait_for(lambda: begun[0] > mine, 5))
        return run_stage(model, stage, step, given)

    monkeypatch.setattr(stages, "run_stage", meeting)
    return together


def test_stages_work_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage waits in each step until the first one has begun the next: nobody would, if one waited for the
    other's answer."""
    path = str(checkpoint("llama", tmp_path))
    expected, _ = served(path, many(4, 12))
    together = watched(monkeypatch, 12)
    found, told = served(path, many(4, 12), pp_size=2)
    assert {key: value[0] for key, value in found.items()} == {key: value[0] for key, value in expected.items()}
    assert together[2:] == [True] * 10
    decodes = [batch.slots for batch in planned(told) if batch.num_rows == 2]
    pairs = list(pairwise(decodes))
    assert len(pairs) > 15 and not any(np.isin(*pair).any() for pair in pairs), "rows of one are not in the next"
    assert not any(isinstance(one, Chosen) for one in told)


def test_chunks_of_a_prompt_follow_each_other_through_the_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six chunks the last one alone yields: no other is waited for before the next begins."""
    path = str(checkpoint("llama", tmp_path))
    prompt = pack_ids(np.arange(5, 96).tolist())
    submits = [Submit(id="p", input_ids=prompt, sampling=SamplingParams(max_new_tokens=1, temperature=0.0))]
    expected, _ = served(path, submits)
    together = watched(monkeypatch, 5)
    found, told = served(path, submits, pp_size=2)
    assert found["p"][0] == expected["p"][0]
    assert [batch.num_tokens for batch in planned(told)] == [16, 16, 16, 16, 16, 11]
    assert together == [True] * 5


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"pp_size": 2}, {"pp_size": 2, "tp_size": 2}, GROUPS], ids=str)
def test_chunks_of_equal_time_give_the_same_tokens(sizes: dict[str, Any], tmp_path: Path) -> None:
    """Beside rows that decode; a price is set, and what steps have shown replaces it."""
    path, more = str(checkpoint("llama", tmp_path)), {"context_length": 512, "max_total_tokens": 1600}
    sampling = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
    prompts = [(np.arange(400) * (3 + row) % 90 + 5).tolist() for row in range(2)] + [[7, 8, 9]]
    submits = [Submit(id=f"p{row}", input_ids=pack_ids(ids), sampling=sampling) for row, ids in enumerate(prompts)]
    expected, _ = served(path, submits, **more, tp_size=1)
    config = Config.from_flat({"model_path": path, **OPTIONS, **more, **sizes, "enable_dynamic_chunking": True})
    ranks = ThreadRanks(config, describe(path))
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    try:
        chunks = core.scheduler.planner.chunks
        assert chunks is not None and chunks.price == Price()
        chunks.price = Price(0.02)
        before = list[int]()
        took = chunks.took
        chunks.took = lambda sample: (before.append(int(sample.tokens)), took(sample))[1]  # type: ignore[method-assign]
        found = answers(core, submits)
    finally:
        core.close()
    assert {key: value[0] for key, value in found.items()} == {key: value[0] for key, value in expected.items()}
    assert len(before) > 4, "steps are measured"
    lens = [batch.query_lens.tolist() for batch in planned(ranks.told)]
    assert max(max(row) for row in lens) == 16 and sum(sum(row) for row in lens) >= 803


def test_without_overlap_a_step_is_waited_for(tmp_path: Path) -> None:
    path = str(checkpoint("llama", tmp_path))
    expected, _ = served(path, many(3, 6))
    found, told = served(path, many(3, 6), pp_size=2, disable_overlap_schedule=True)
    assert {key: value[0] for key, value in found.items()} == {key: value[0] for key, value in expected.items()}
    assert [batch.num_rows for batch in planned(told)].count(3) >= 4, "all rows in one step"
