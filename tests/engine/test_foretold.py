"""Every kernel that steps launch is compiled beside the loading: for each way of serving a model, steps of random
shapes launch none that the process was not told of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import draft_support
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton")

from steps_without_data import plan_of, small_plan, tiny_config, unforetold

from phloem.core.speculation import Wanted
from phloem.engine import ahead
from phloem.speculation.ahead import drafts
from phloem.testing.checkpoints import families, tiny_checkpoint

MOE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "norm_topk_prob": True}
SPARSE: dict[str, Any] = {"config": {"model_type": "qwen3_moe", **MOE}}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "invariant": {"ops": "invariant"},
    "invariant, experts": {"ops": "invariant", **SPARSE},
    "flash": {"backend": "flash"},
    "flashinfer": {"backend": "flashinfer"},
    "reference attention": {"backend": "reference"},
    "another page size": {"page": 64},
    "float16": {"dtype": "float16", "kv_dtype": "float16"},
    "float32": {"dtype": "float32", "kv_dtype": "float32"},
    "float8 cache without scales": {"kv_dtype": "float8_e4m3fn"},
    "float8 cache, scales of layers and of heads": {"kv_dtype": "float8_e4m3fn", "scales": {0: (1, 1), 1: (2, 2)}},
    "float8 cache of flashinfer": {"kv_dtype": "float8_e4m3fn", "scales": {0: (1, 1)}, "backend": "flashinfer"},
    "adapters of rank 8": {"adapters": (4, 8)},
    "adapters of rank 16": {"adapters": (4, 16)},
    "adapters of rank 40": {"adapters": (4, 40)},
    "adapters beside experts": {"adapters": (2, 16), **SPARSE},
    "a larger GPU, more rows": {"processors": 160, "running": 100, "chunk": 512},
    "a small GPU": {"processors": 24, "target": ("cuda", 80, 32)},
    "AMD": {"target": ("hip", "gfx942", 64), "processors": 304},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_step_needs_a_kernel_that_was_not_foretold(way: str) -> None:
    assert not unforetold(small_plan(**WAYS[way]))


# What is not foretold, and why: kernels of these are compiled when they are first needed.
UNFORETOLD: dict[str, str] = {}


@pytest.mark.slow
@pytest.mark.some(16)
@pytest.mark.parametrize("name", families())
def test_no_step_of_any_family_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = unforetold(plan_of(tiny_config(name, tmp_path)), steps=10)
    assert bool(found) == (name in UNFORETOLD), found


HEADS: dict[str, Any] = {"eagle": draft_support.eagle, "eagle3": draft_support.eagle3}


@pytest.mark.parametrize("kind", ["draft_model", "eagle", "eagle3"])
def test_nor_does_what_drafts(kind: str, tmp_path: Path) -> None:
    """Its passes, its choice, and the states that the model keeps for it, are launched by no other step."""
    if kind == "draft_model":
        pytest.importorskip("transformers")
        path = tiny_checkpoint("qwen2", tmp_path)
    else:
        path = HEADS[kind](tmp_path / "head")
    settings: dict[str, Any] = {"config": {"num_hidden_layers": 8}, "running": 8, "chunk": 128}
    plan = small_plan(drafting=asdict(Wanted(kind, draft_model=str(path))), **settings)
    assert not unforetold(plan, drafts)
    without = small_plan(**settings)
    assert set(ahead.trace(without)[0].found) < set(ahead.trace(plan, drafts)[0].found)


@pytest.mark.slow
def test_nor_does_the_layer_that_a_checkpoint_brings_for_drafts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = tiny_config("deepseek_v3", tmp_path)
    depth = found.config["num_hidden_layers"]
    file = tmp_path / "model.safetensors"
    save_file({f"model.layers.{depth}.enorm.weight": torch.ones(32)}, file)  # whose name alone is looked at
    told = {"drafting": asdict(Wanted("mtp")), "path": str(tmp_path), "files": [str(file)]}
    plan = plan_of(found, running=8, chunk=128, **told)
    assert not unforetold(plan, drafts)
    assert set(ahead.trace(plan)[0].found) < set(ahead.trace(plan, drafts)[0].found)
