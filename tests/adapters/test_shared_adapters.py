"""Adapters of a model that several ranks share out: each keeps its part, and answers are those of one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import write_adapter
from loads import answers, load
from share_support import ThreadRanks, checkpoint

from phloem import Engine
from phloem.adapters._fits import Fit
from phloem.adapters._shares import Share, packed, unpacked
from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import PhloemError
from phloem.core.messages import Submit
from phloem.launch.core import EngineCore

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "ops": "reference", "max_total_tokens": 1024, "page_size": 8, "context_length": 128,
    "chunked_prefill_size": 16, "max_running_requests": 4, "debug_invariants": True, "random_seed": 1, "threads": 1,
}  # fmt: skip


def test_a_share_is_cut_as_the_layer_is() -> None:
    made = torch.Generator().manual_seed(0)
    whole = Fit(
        2, torch.randn(2, 2, 6, generator=made), torch.randn(2, 8, generator=made), torch.ones(8), torch.randn(8)
    )
    x = torch.randn(3, 6, generator=made)
    rows = [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])]
    first, second = (Share(slice(0, 6), one, True).cut(whole) for one in rows)
    for one, columns in ((first, rows[0]), (second, rows[1])):
        assert torch.equal(one.up, whole.up[:, columns]) and torch.equal(one.down, whole.down)
        assert one.shift is not None and whole.shift is not None and torch.equal(one.shift, whole.shift[columns])
    every = torch.arange(8)
    halves = [Share(slice(at, at + 3), every, not at).cut(whole) for at in (0, 3)]
    sums = [x[:, at : at + 3] @ half.down[0].T @ half.up + half.shift for at, half in zip((0, 3), halves, strict=True)]
    torch.testing.assert_close(sums[0] + sums[1], x @ whole.down[0].T @ whole.up + whole.shift)


def test_what_ranks_are_told_is_what_was_put() -> None:
    fits = {3: Fit(1, torch.ones(1, 1, 4), torch.ones(1, 4)), 0: Fit(0, torch.ones(1, 0, 2), torch.ones(0, 2))}
    fits[5] = replace(fits[3], factor=torch.ones(4), shift=torch.zeros(4))
    found = unpacked(packed(fits))
    assert set(found) == {0, 3, 5} and found[0].rank == 0 and found[3].factor is None
    for number, fit in fits.items():
        assert torch.equal(found[number].down, fit.down) and torch.equal(found[number].up, fit.up)
    assert found[5].shift is not None and not found[5].shift.any()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "a": {}, "b": {"r": 8, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}, "c": {"lora_bias": True}
    }  # fmt: skip
    return {
        name: write_adapter(base, made / name, seed, strong=2.0, **kind)
        for seed, (name, kind) in enumerate(kinds.items(), 3)
    }


def loads_of(names: list[str]) -> list[Submit]:
    found = load()
    for number, submit in enumerate(found):
        submit.adapter = names[number % len(names)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_answer_as_one_does(size: int, base: Path, folders: dict[str, Path]) -> None:
    options = {**OPTIONS, "model_path": str(base), "lora_paths": [f"{name}={path}" for name, path in folders.items()]}
    names = ["a", "b", "", "c"]

    def found(**sizes: int) -> dict[str, Any]:
        config = Config.from_flat({**options, **sizes})
        ranks = ThreadRanks(config, describe(str(base))) if sizes else None
        core = EngineCore(config, describe(str(base)), lambda message: None, ranks)
        try:
            return answers(core, loads_of(names))
        finally:
            core.close()

    one, several = found(), found(tp_size=size)
    for key, (tokens, values, prompt) in one.items():
        assert several[key][0] == tokens, key
        assert several[key][1] == pytest.approx(values, abs=1e-3)
        assert several[key][2] == pytest.approx(prompt, abs=1e-3)


@pytest.mark.slow
def test_over_processes_they_come_and_go_and_what_one_rank_serves_alone_is_refused(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    settings: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 1024, "enable_lora": True}
    asked: dict[str, Any] = {"input_ids": [[7, 99, 31]] * 3, "sampling_params": greedy, "lora_path": ["a", None, "b"]}

    def said(engine: Engine) -> list[list[int]]:
        for name in ("a", "b"):
            engine.load_lora_adapter(name, str(folders[name]))
        return [one["output_ids"] for one in engine.generate(**asked)]  # type: ignore[union-attr, call-overload]

    with Engine(model_path=str(base), **settings) as engine:
        expected = said(engine)
    with Engine(model_path=str(base), tp_size=2, **settings) as engine:
        assert said(engine) == expected
        head = write_adapter(base, tmp_path / "head", target_modules=["lm_head"])
        with pytest.raises(PhloemError, match=r"lm_head.*served by one rank alone"):
            engine.load_lora_adapter("a", str(head))
        dora = write_adapter(base, tmp_path / "dora", use_dora=True)
        with pytest.raises(PhloemError, match="no rank has a whole one"):
            engine.load_lora_adapter("a", str(dora))
        assert said(engine) == expected
