"""What the ranks of a model launch is compiled by one process for all of them: what it finds for each rank alone is
what ranks that meet, each in a thread, launch in steps of random shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from share_support import _threads, checkpoint
from steps_without_data import random_step, small_plan, told

from phloem.distributed.comm import Threads
from phloem.distributed.groups import Groups
from phloem.engine.ranks.parallel import shared
from phloem.engine.ranks.stages import Together
from phloem.engine.warmup import ahead
from phloem.engine.warmup.alone import Arrangement
from phloem.kernels.triton import ahead as kernels

SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32,
    "norm_topk_prob": True, **SIZES,
}  # fmt: skip
DENSE_FIRST = {**MOE, "mlp_only_layers": [0], "num_hidden_layers": 4}
WAYS: dict[str, tuple[dict[str, Any], Arrangement, dict[str, Any]]] = {
    "heads": (SIZES, Arrangement(tp=2), {}),
    "heads, adapters": (SIZES, Arrangement(tp=4), {"adapters": (2, 16)}),
    "fewer kv heads than ranks": ({**SIZES, "num_key_value_heads": 2}, Arrangement(tp=4), {}),
    "heads, a float8 cache": (SIZES, Arrangement(tp=2), {"kv_dtype": "float8_e4m3fn", "scales": {0: (1, 1)}}),
    "flashinfer": (SIZES, Arrangement(tp=2), {"backend": "flashinfer"}),
    "stages": ({**SIZES, "num_hidden_layers": 4}, Arrangement(pp=2), {}),
    "three stages": ({**SIZES, "num_hidden_layers": 9}, Arrangement(pp=3), {}),
    "stages of heads": (SIZES, Arrangement(pp=2, tp=2), {}),
    "parts of prompts": (SIZES, Arrangement(cp=2), {}),
    "experts": (MOE, Arrangement(tp=4, ep=4), {}),
    "experts, cut": (MOE, Arrangement(tp=4, ep=2), {}),
    "experts, counted": (MOE, Arrangement(tp=2, ep=2), {"spread": (2, True)}),
    "groups": (MOE, Arrangement(dp=2, tp=2, ep=4), {}),
    "all to all": (MOE, Arrangement(dp=2, ep=2, backend="torch"), {}),
    "few rows all to all": (MOE, Arrangement(dp=2, ep=2, backend="deepep_low_latency"), {}),
    "stages of groups": (DENSE_FIRST, Arrangement(pp=2, dp=2, ep=2), {}),
}


class Scattered:
    """Rows that go to experts, of which any number comes, for each expert apart or together."""

    def __init__(self, ranks: int, rank: int, few: int) -> None:
        self._ranks, self._few, self._random = ranks, few, np.random.default_rng(rank)

    def start(self, routed: Any, make: Any, /, *, weighted: bool = True) -> Callable[[], torch.Tensor]:
        x, k = routed.x_TN, routed.ids_Tk.shape[1]
        count = int(self._random.integers(0, routed.most * self._ranks + 1))
        choices = 1 if weighted and routed.most <= self._few else k
        make(
            x.new_empty((count, x.shape[1])),
            *(y.new_empty((count, choices)) for y in (routed.ids_Tk, routed.weights_Tk)),
        )
        return lambda: torch.empty_like(x)


def meeting(plan: ahead.Plan, steps: int, monkeypatch: pytest.MonkeyPatch) -> kernels.Notes:
    """What all ranks launch in random steps, as threads that meet."""
    made = plan.ranks
    assert made is not None
    monkeypatch.setattr(Threads, "device", torch.device("meta"))
    ends = Groups.threads(made.pp, made.stage, dp=made.dp * made.cp)

    def placed(ctx: Any, arrangement: Arrangement, rank: int) -> Any:
        own = shared(ctx, arrangement.mesh(rank), ends[rank], "none" if made.backend == "none" else "torch")
        if own.rows is not None:
            own.rows.exchange = Scattered(made.stage, rank, 128 if "low" in made.backend else 0)
        return own, ends[rank]

    monkeypatch.setattr(ahead, "placed", placed)
    monkeypatch.setattr(ahead, "Alone", lambda model, groups, dtype: Together(model, groups))

    def work(groups: Groups) -> None:
        with torch.inference_mode():
            need = ahead.need_of(plan, rank=groups.rank)
            pool = ahead.pool_of(need)
            random = np.random.default_rng(0)
            for number in range(steps):
                random_step(need, pool, plan, random, number)

    notes = kernels.Notes()
    with notes.taken():
        _threads([Named(groups) for groups in ends], lambda end: work(end.groups))
    return notes


class Named:
    """A rank's groups, as `_threads` asks for."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.rank = groups, groups.rank

    def abort(self) -> None:
        self.groups.abort()


def unforetold(plan: ahead.Plan, monkeypatch: pytest.MonkeyPatch, steps: int = 15) -> list[str]:
    found = ahead.trace(plan)[0].found
    launched = meeting(plan, steps, monkeypatch).found
    assert launched and len(found) < 4 * len(launched) + 20
    return [note.name for key, note in launched.items() if key not in found]


@pytest.mark.slow
@pytest.mark.some(4)
@pytest.mark.parametrize("way", WAYS)
def test_no_rank_needs_a_kernel_that_was_not_foretold(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ranks, more = WAYS[way]
    assert not unforetold(small_plan(config=config, ranks=ranks, **more), monkeypatch)


@pytest.mark.slow
@pytest.mark.some(2)
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "gemma3_text", "gpt_oss", "qwen3_next", "gemma2"])
@pytest.mark.parametrize("ranks", [{"tp_size": 2}, {"tp_size": 2, "pp_size": 2}], ids=["tp", "pp"])
def test_nor_does_one_of_a_model_that_is_told_of_by_its_settings(
    name: str, ranks: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    plan, refusal = told(checkpoint(name, tmp_path), monkeypatch, device="cuda", **ranks)
    assert refusal is None and plan.ranks == Arrangement(tp=2, pp=ranks.get("pp_size", 1))
    assert not unforetold(plan, monkeypatch, 10)


def test_how_ranks_share_a_model_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    path = checkpoint("qwen3_moe", tmp_path)
    settings: dict[str, Any] = {"tp_size": 4, "ep_size": 4, "attn_dp_size": 2, "ep_num_redundant_experts": 4}
    plan, refusal = told(path, monkeypatch, device="cuda", **settings, enable_eplb=True)
    assert refusal is None and plan.ranks == Arrangement(dp=2, tp=2, ep=4) and plan.spread == (4, True)
    alone, _ = told(path, monkeypatch, device="cuda", enable_return_routed_experts=True)
    assert alone.ranks is None and alone.told and not told(path, monkeypatch)[0].told
    # The experts of tokens are then chosen by one op and computed by another.
    plain = {note.name for note in ahead.trace(told(path, monkeypatch)[0])[0].found.values()}
    assert {note.name for note in ahead.trace(alone)[0].found.values()} != plain
