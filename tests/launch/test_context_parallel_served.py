"""Ranks that share out the tokens of prompts, under a scheduler, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loads import answers, load
from nodes_support import FurtherNode, free_port, options
from share_support import ThreadRanks, checkpoint, planned

from phloem import Engine
from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.launch.core import EngineCore

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "ops": "reference", "page_size": 8, "context_length": 128, "chunked_prefill_size": 16,
    "max_running_requests": 4, "max_total_tokens": 160, "random_seed": 1, "threads": 1, "log_level": "warning",
}  # fmt: skip
SMALL: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 2048, "log_level": "warning"}
PAIR: dict[str, Any] = {"tp_size": 2, "attn_cp_size": 2}


def of_one_rank(path: str) -> dict[str, Any]:
    config = Config.from_flat({"model_path": path, "debug_invariants": True, **OPTIONS})
    one = EngineCore(config, describe(path), lambda message: None)
    try:
        return answers(one, load())
    finally:
        one.close()


def alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, (ids, values, prompt) in expected.items():
        assert found[key][0] == ids and len(ids) > 3, key
        assert found[key][1] == pytest.approx(values, abs=1e-4), key
        assert found[key][2] == pytest.approx(prompt, abs=1e-4, nan_ok=True), key


@pytest.mark.some(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", PAIR),
        ("qwen3", {"tp_size": 4, "attn_cp_size": 2}),
        ("gemma3_text", PAIR),
        ("qwen3_moe", {**PAIR, "ep_size": 2}),
        ("qwen3_moe", {**PAIR, "ep_size": 2, "moe_a2a_backend": "torch"}),
        ("deepseek_v3", {"tp_size": 4, "attn_cp_size": 4, "ep_size": 2}),
        ("deepseek_v32", PAIR),
        ("llama", {**PAIR, "pp_size": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(size) for size in value.values()),
)
def test_shared_tokens_are_answered_as_by_one_rank(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """With prefix hits, chunks, preemption, grammars, penalties and log probabilities."""
    path = str(checkpoint(name, tmp_path))
    expected = of_one_rank(path)
    config = Config.from_flat({"model_path": path, "debug_invariants": True, **OPTIONS, **sizes})
    ranks = ThreadRanks(config, describe(path))
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    try:
        found = answers(core, load())
        assert core.scheduler.planner.cached_tokens > 0
    finally:
        core.close()
    alike(found, expected)
    lens = [batch.query_lens for batch in planned(ranks.told)]
    assert sum(each.max() >= 2 * config.runtime.attn_cp_size for each in lens) > 5, "chunks that are shared out"
    decisions = {name: why for name, _, why in core.info["decisions"]}
    assert f"the tokens of a prompt over {config.runtime.attn_cp_size} of them (attn_cp_size)" in decisions["tp_size"]


@pytest.mark.slow
@pytest.mark.parametrize(("comm", "name"), [("shm", "qwen3_moe"), ("gloo", "llama")])
def test_processes_share_tokens_out(comm: str, name: str, tmp_path: Path) -> None:
    path = str(checkpoint(name, tmp_path))
    prompts = ["hello world " * 8, "a story of a long journey, told in short"]
    asks: list[dict[str, Any]] = [
        {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
        {"temperature": 1, "top_p": 0.9, "max_new_tokens": 12, "ignore_eos": True, "sampling_seed": 3},
    ]
    with Engine(model_path=path, **SMALL) as one:
        expected = [each["output_ids"] for each in one.generate(prompts, asks)]
    with Engine(model_path=path, tp_comm=comm, **PAIR, **SMALL) as engine:
        assert [each["output_ids"] for each in engine.generate(prompts, asks)] == expected
        again = engine.generate(prompts[0], asks[0])  # from the cache
        assert again["output_ids"] == expected[0] and again["meta_info"]["cached_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [PAIR, {"tp_size": 2, "attn_dp_size": 2}], ids=["context", "groups"])
def test_ranks_with_different_rows_may_lie_on_two_nodes(sizes: dict[str, Any], tmp_path: Path) -> None:
    path, port = str(checkpoint("llama", tmp_path)), free_port()
    other = FurtherNode(path, *options(port, **OPTIONS, **sizes))
    try:
        expected = of_one_rank(path)
        nodes = {"nnodes": 2, "dist_init_addr": f"127.0.0.1:{port}"}
        config = Config.from_flat({"model_path": path, **OPTIONS, **sizes, **nodes})
        core = EngineCore(config, describe(path), lambda message: None)
        try:
            found = answers(core, load())
        finally:
            core.close()
        assert other.wait() == 0, other.lines
    finally:
        other.close()
    alike(found, expected)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"tp_size": 3}, "attn_cp_size 2: tokens are shared out among the 3 ranks of tp_size; valid: 1, 3"),
        ({"tp_size": 4, "attn_dp_size": 2}, r"attn_cp_size 2: each of 2 groups \(attn_dp_size\) has requests of its"),
        ({"tp_size": 2, "moe_a2a_backend": "torch"}, r"ep_size 1 and attn_dp_size \(or attn_cp_size\) 2 must be"),
    ],
)
def test_sizes_that_cannot_be_are_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Config.from_flat({"attn_cp_size": 2, **values})


def test_recurrent_layers_are_refused_before_any_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint("qwen3_next", tmp_path)
    monkeypatch.setattr("phloem.launch.core.RankProcesses", None)
    with pytest.raises(ModelLoadError, match="attn_cp_size 2: recurrent layers take the tokens of a prompt in"):
        Engine(model_path=str(path), **PAIR, **SMALL)


@pytest.mark.parametrize("name", ["attn_cp_size", "attention-context-parallel-size", "context-parallel-size"])
def test_the_spellings_of_other_engines_are_understood(name: str) -> None:
    assert Config.from_flat({"tp": 2, name: 2}).runtime.attn_cp_size == 2


@pytest.mark.parametrize("name", ["prefill-context-parallel-size", "dcp_size", "enable_prefill_cp"])
def test_what_means_something_else_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: there is no .*attn_cp_size|{name}: there is no context"):
        Config.from_flat({name: 2})
