"""Groups of ranks that attend to requests of their own, under one scheduler, and what they answer."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import deep_ep_stand_in
import pytest
import torch
from loads import answers, load
from share_support import ThreadRanks, checkpoint, planned

from phloem import Engine
from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.distributed import deepep
from phloem.engine.ranks.parallel import Go, Moved
from phloem.launch.core import EngineCore

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "ops": "reference", "page_size": 8, "context_length": 128, "chunked_prefill_size": 16,
    "max_running_requests": 4, "debug_invariants": True, "random_seed": 1, "threads": 1, "log_level": "warning",
}  # fmt: skip
SMALL: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 2048, "log_level": "warning"}
PAIR: dict[str, Any] = {"tp_size": 2, "attn_dp_size": 2}


@pytest.mark.some(4)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "tokens"),
    [
        ("llama", {**PAIR, "max_running_requests": 8}, 88),
        ("qwen3_moe", {"tp_size": 2, "attn_dp_size": 2, "ep_size": 2}, 160),
        ("deepseek_v3", {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "ep_size": 2}, 160),
        ("qwen3_moe", {**PAIR, "ep_size": 2, "moe_a2a_backend": "torch"}, 160),
        ("deepseek_v3", {"tp_size": 4, "attn_dp_size": 4, "ep_size": 4, "moe_a2a_backend": "torch"}, 160),
        ("qwen3_moe", {**PAIR, "ep_size": 2, "moe_a2a_backend": "deepep"}, 160),
        ("deepseek_v3", {"tp_size": 4, "attn_dp_size": 4, "ep_size": 4, "moe_a2a_backend": "deepep_low_latency"}, 160),
        ("gemma3_text", PAIR, 160),
        ("qwen3_next", PAIR, 160),
        ("llama", {**PAIR, "pp_size": 2}, 160),
        ("qwen3_next", {**PAIR, "pp_size": 2}, 160),
        (
            "qwen3_moe",
            {
                **PAIR,
                "ep_size": 2,
                "enable_eplb": True,
                "eplb_rebalance_num_iterations": 6,
                "ep_num_redundant_experts": 4,
            },
            160,
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_groups_answer_as_one_rank_does(
    name: str, sizes: dict[str, Any], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prefix hits, chunks, preemption, grammars, penalties and log probabilities. DeepEP is a stand-in of it."""
    monkeypatch.setitem(sys.modules, deepep.PACKAGE, deep_ep_stand_in.module())
    monkeypatch.setattr(deepep, "refuse", lambda *_: None)
    monkeypatch.setattr(deepep.DeepEP, "carries", torch.float32)
    path = str(checkpoint(name, tmp_path))
    one = EngineCore(
        Config.from_flat({"model_path": path, "max_total_tokens": 160, **OPTIONS}), describe(path), lambda message: None
    )
    try:
        expected = answers(one, load())
    finally:
        one.close()
    config = Config.from_flat({"model_path": path, "max_total_tokens": tokens, **OPTIONS, **sizes})
    groups = config.runtime.attn_dp_size
    assert groups in (2, 4) and config.runtime.dp_size == 1
    ranks = ThreadRanks(config, describe(path))
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    try:
        found = answers(core, load())
        planner, cache = core.scheduler.planner, core.scheduler.cache
        assert (planner.cached_tokens > 0 or groups > 2) and (planner.preemptions > 0 or tokens > 88)
        assert all(part.tree.pages > 0 for part in cache.parts), "each keeps what it has computed"
    finally:
        core.close()
    for key, (ids, values, prompt) in expected.items():
        assert found[key][0] == ids and len(ids) > 3, key
        assert found[key][1] == pytest.approx(values, abs=1e-4), key
        assert found[key][2] == pytest.approx(prompt, abs=1e-4, nan_ok=True), key
    kinds = Counter(len(set((batch.slots % groups).tolist())) for batch in planned(ranks.told))
    assert kinds[groups] > 5, "steps of all groups"
    assert kinds[1] > 0, "steps in which the others have nothing"
    assert sum(isinstance(one, Go) for one in ranks.told) > 20
    if config.experts.enable_eplb:
        assert any(isinstance(one, Moved) for one in ranks.told), "experts have moved meanwhile"
    calls = {call for buffer in deep_ep_stand_in.Buffer.made for call in buffer.calls}
    by = {"deepep": {"dispatch"}, "deepep_low_latency": {"low_latency_dispatch"}}
    assert by.get(config.runtime.moe_a2a_backend, set()) == calls & {"dispatch", "low_latency_dispatch"}
    decisions = {name: (value, why) for name, value, why in core.info["decisions"]}
    assert f"{groups} groups of them attend to rows of their own (attn_dp_size)" in decisions["tp_size"][1]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"tp_size": 3}, "attn_dp_size 2: groups of the 3 ranks of tp_size; valid: 1, 3"),
        ({"tp_size": 1}, "attn_dp_size 2: groups of the 1 ranks of tp_size; valid: 1"),
        ({"tp_size": 2, "enable_hierarchical_cache": True}, "attn_dp_size 2: cache tiers"),
        ({"tp_size": 2, "kv_events_config": '{"publisher": "zmq"}'}, "attn_dp_size 2: cache events"),
        ({"tp_size": 2, "max_running_requests": 1}, "attn_dp_size 2: each group needs a running request"),
        (
            {"tp_size": 2, "moe_a2a_backend": "torch"},
            r"moe_a2a_backend: tp_size 2, ep_size 1 and attn_dp_size \(or attn_cp_size\) 2",
        ),
        (
            {"tp_size": 2, "ep_size": 2, "moe_a2a_backend": "torch", "enable_eplb": True},
            "not with enable_eplb",
        ),
        ({"tp_size": 2, "ep_size": 2, "moe_a2a_backend": "deepep"}, "deepep moves rows between NVIDIA's .* choose"),
        ({"tp_size": 2, "ep_size": 2, "moe_a2a_backend": "pplx"}, "'pplx' is not one of none, torch, deepep"),
    ],
)
def test_what_groups_do_not_serve_is_refused_before_any_process(
    values: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("llama", tmp_path)
    monkeypatch.setattr("phloem.launch.core.RankProcesses", None)
    with pytest.raises(ConfigError, match=why):
        Engine(model_path=str(path), **{**SMALL, "attn_dp_size": 2, **values})


def test_the_spelling_of_sglang_is_understood() -> None:
    config = Config.from_flat({"tp": 4, "dp": 2, "enable-dp-attention": True})
    assert (config.runtime.attn_dp_size, config.runtime.dp_size, config.runtime.tp_size) == (2, 1, 4)
    assert Config.from_flat(config.flat()) == config
    with pytest.raises(ConfigError, match="enable_dp_attention: how many groups"):
        Config.from_flat({"tp": 4, "enable_dp_attention": True})
    with pytest.raises(ConfigError, match="attn_dp_size: 4 is not what dp_size says, 2"):
        Config.from_flat({"tp": 4, "dp": 2, "attn_dp_size": 4, "enable_dp_attention": True})


@pytest.mark.slow
@pytest.mark.parametrize(("comm", "backend"), [("shm", "none"), ("shm", "torch"), ("gloo", "torch")])
def test_processes_answer_as_one_rank_does(comm: str, backend: str, tmp_path: Path) -> None:
    path = str(checkpoint("qwen3_moe", tmp_path))
    asks: list[dict[str, Any]] = [
        {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
        {"temperature": 1, "top_p": 0.9, "max_new_tokens": 16, "ignore_eos": True, "sampling_seed": 3},
        {"temperature": 0, "max_new_tokens": 12, "regex": "[a-d]+x"},
    ]
    texts = ["hello world", "a story", "hello word"]
    with Engine(model_path=path, **SMALL) as one:
        expected = [one.generate(text, ask)["output_ids"] for text, ask in zip(texts, asks, strict=True)]
    with Engine(model_path=path, ep_size=2, tp_comm=comm, moe_a2a_backend=backend, **PAIR, **SMALL) as engine:
        found = engine.generate(texts, asks)  # at the same time
        assert [each["output_ids"] for each in found] == expected
        state = engine.get_server_info()["internal_states"][0]
        assert state["total_tokens"] == 2 * SMALL["max_total_tokens"]
