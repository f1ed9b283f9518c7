"""Adapters and drafts on ranks in every arrangement: greedy tokens are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_support import plain_adapter
from loads import answers, load
from share_support import ThreadRanks, checkpoint, planned

from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.core.messages import Submit
from phloem.engine.ranks.parallel import Placed, ranks_of
from phloem.launch.core import EngineCore

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "ops": "reference", "page_size": 8, "context_length": 128, "chunked_prefill_size": 16,
    "max_running_requests": 4, "max_total_tokens": 160, "debug_invariants": True, "random_seed": 1, "threads": 1,
    "log_level": "warning",
}  # fmt: skip
GROUPS = {"tp_size": 2, "attn_dp_size": 2}
DRAFTS: dict[str, Any] = {"speculative_algorithm": "suffix", "disable_speculative_adaptive": True}


def named(sizes: dict[str, Any]) -> str:
    return "-".join(f"{key.removesuffix('_size')}{size}" for key, size in sizes.items())


def served(path: str, submits: list[Submit], **options: Any) -> tuple[dict[str, Any], list[Any], dict[str, str]]:
    """Answers, what ranks were told, and the reasons of what was chosen."""
    config = Config.from_flat({"model_path": path, **OPTIONS, **options})
    ranks = ThreadRanks(config, describe(path)) if ranks_of(config) > 1 else None
    core = EngineCore(config, describe(path), lambda message: None, ranks)
    why = {name: reason for name, _, reason in core.info["decisions"]}
    try:
        return answers(core, submits), [] if ranks is None else ranks.told, why
    finally:
        core.close()


def alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, (tokens, values, prompt) in expected.items():
        assert found[key][0] == tokens and len(tokens) > 3, key
        assert found[key][1] == pytest.approx(values, abs=1e-4), key
        assert found[key][2] == pytest.approx(prompt, abs=1e-4, nan_ok=True), key


# The first two stand for the others, but with `--every`.
ADAPTED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"pp_size": 2, "tp_size": 4, "attn_dp_size": 2}),
    ("deepseek_v3", {**GROUPS, "ep_size": 2, "moe_a2a_backend": "torch"}),
    ("llama", {"pp_size": 2}),
    ("llama", GROUPS),
    ("llama", {"tp_size": 4, "attn_cp_size": 2}),
    ("qwen3_next", {"pp_size": 2, "tp_size": 2}),
]
DRAFTED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"pp_size": 2}),
    ("llama", GROUPS),
    ("gemma3_text", {"tp_size": 2, "attn_cp_size": 2}),
    ("llama", {"pp_size": 2, "tp_size": 2, "attn_dp_size": 2}),
    ("qwen3_moe", {"pp_size": 2, "tp_size": 2, "ep_size": 2, "speculative_algorithm": "ngram"}),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    most = None if metafunc.config.getoption("--every") else 2
    for fixture, cases in (("adapted", ADAPTED), ("drafted", DRAFTED)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, cases[:most], ids=lambda case: f"{case[0]}-{named(case[1])}")


@pytest.mark.slow
def test_adapters_on_ranks_answer_as_on_one(adapted: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Two beside rows without, with prefix hits, chunks, preemption, grammars, penalties and log probabilities."""
    name, sizes = adapted
    path = checkpoint(name, tmp_path / "base")
    given = [f"{seed}={plain_adapter(path, tmp_path / f'adapter{seed}', seed)}" for seed in (1, 2)]

    def asked() -> list[Submit]:
        found = load()
        for number, submit in enumerate(found):
            submit.adapter = ("", "1", "2")[number % 3]
        return found

    plain, _, _ = served(str(path), load())
    expected, _, _ = served(str(path), asked(), lora_paths=given)
    assert sum(expected[key][0] != plain[key][0] for key in plain) >= 5, "adapters say something else"
    found, told, _ = served(str(path), asked(), lora_paths=given, **sizes)
    alike(found, expected)
    assert sum(isinstance(one, Placed) for one in told) == 2
    kinds = [len(set(batch.adapters.tolist())) for batch in planned(told) if batch.adapters is not None]
    assert max(kinds) >= 2, "several in one step"


@pytest.mark.slow
def test_drafts_on_ranks_are_verified_as_on_one(drafted: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, sizes = drafted
    path = str(checkpoint(name, tmp_path))
    expected, _, _ = served(path, load())
    found, told, _ = served(path, load(), **{**DRAFTS, **sizes})
    alike(found, expected)
    verified = [batch.outputs for batch in planned(told) if (batch.outputs > 1).any()]
    assert len(verified) >= 2
    assert np.concatenate(verified).max() > 2, "several drafts at a time"


@pytest.mark.parametrize(
    ("name", "sizes", "why"),
    [
        ("qwen3_next", {"pp_size": 2}, "states without refused drafts are made anew on one rank, and pp_size is 2"),
        ("llama", {**GROUPS, "enable_lora": True}, "beside adapters, drafts"),
    ],
)
def test_drafts_that_ranks_do_not_verify_are_refused(
    name: str, sizes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = str(checkpoint(name, tmp_path))
    with pytest.raises(ConfigError, match=why):
        served(path, [], **{**DRAFTS, **sizes})
