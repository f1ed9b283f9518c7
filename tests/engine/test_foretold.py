"""Every kernel that steps launch is compiled beside the loading: for each way of serving a model, steps of random
shapes launch none that the process was not told of."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import draft_support
import msgspec
import numpy as np
import packers
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton")

from steps_without_data import plan_of, small_plan, tiny_config, told, unforetold

from phloem.checkpoint.describe import describe
from phloem.core.resolve import Decision
from phloem.core.speculation import Wanted
from phloem.engine.pooled import run_texts
from phloem.engine.warmup import ahead, foretold, warm
from phloem.kernels.ops import Ops
from phloem.kernels.shapes_only import shapes_only
from phloem.kernels.triton import ahead as kernels
from phloem.kernels.triton import table
from phloem.kernels.triton._device import AHEAD
from phloem.layers.context import BuildContext
from phloem.models._pooled import load_pooled
from phloem.platforms._compiled import Tally
from phloem.speculation.ahead import drafts
from phloem.testing.checkpoints import families, tiny_checkpoint, tiny_gguf

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


@pytest.mark.slow
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


def test_nor_does_a_narrow_model_that_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(AHEAD, "capability", 90)
    pack, config, *_ = NARROW["awq"]
    path = tiny_checkpoint("llama", tmp_path / "made", num_hidden_layers=3, vocab_size=384, **SIZES)
    narrow = packers.quantised(path, tmp_path, pack, config)[0]
    plan = small_plan(drafting=asdict(Wanted("draft_model", draft_model=str(narrow))), running=8, chunk=128)
    assert "_gemm_int4" in {note.name for note in ahead.trace(plan, drafts)[0].found.values()}
    assert not unforetold(plan, drafts, steps=10)


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


def test_what_is_told_follows_from_the_model_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    llama, head = tiny_checkpoint("llama", tmp_path / "llama"), draft_support.eagle(tmp_path / "head")
    plan, refusal = told(llama, monkeypatch)
    assert refusal is None and plan.backend == "triton" and plan.kv_dtype == "bfloat16" and plan.running == 8
    assert plan.adapters is None and plan.drafting is None and not plan.scales
    assert not unforetold(plan, drafts, steps=10)
    lora, _ = told(llama, monkeypatch, enable_lora=True, max_lora_rank=24, max_loaded_loras=3)
    assert lora.adapters == (3, 24) and lora.files == [str(llama / "model.safetensors")]
    asked = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": str(head)}
    eagle, _ = told(llama, monkeypatch, **asked)
    assert eagle.drafting is not None and not unforetold(eagle, drafts, steps=10)
    chunked, _ = told(tiny_checkpoint("llama4_text", tmp_path / "llama4"), monkeypatch)
    assert chunked.backend == "reference"  # no other attends by chunks


SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 4}
NARROW: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "blocks": (
        partial(packers.float8, by="block", scale_name="weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [128, 128]}, "_gemm_few", "_gemm_fp8",
    ),
    "rows": (partial(packers.float8, by="row"), {"quant_method": "fbgemm_fp8"}, "_gemm_few", "_quantise_row"),
    "awq": (packers.awq, {"quant_method": "awq", "bits": 4}, "_gemm_int4", "_gemm_int4"),
}  # fmt: skip


@pytest.mark.parametrize("case", NARROW)
def test_kernels_of_narrow_weights_are_foretold(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the headers and scales of the files, of a model of fewer layers than they have."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(AHEAD, "capability", 90)
    pack, config, *wanted = NARROW[case]
    path = tiny_checkpoint("llama", tmp_path / "made", num_hidden_layers=3, **SIZES)
    plan, refusal = told(packers.quantised(path, tmp_path, pack, config)[0], monkeypatch)
    assert refusal is None and plan.stored is not None
    found = {note.name for note in ahead.trace(plan)[0].found.values()}
    assert {*wanted} <= found and not unforetold(plan, steps=10)
    monkeypatch.setattr(AHEAD, "capability", 80)  # has no products of float8, and integers as ever
    found = {note.name for note in ahead.trace(plan)[0].found.values()}
    assert ({*wanted} <= found) == (case == "awq")


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1"])
def test_kernels_of_gguf_files_are_foretold(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    monkeypatch.setattr(AHEAD, "capability", 90)
    path = tiny_checkpoint("llama", tmp_path / "made", num_hidden_layers=3, **SIZES)
    file = tiny_gguf(path, tmp_path / "tiny.gguf", kind)
    plan, refusal = told(file, monkeypatch)
    assert refusal is None and plan.gguf == str(file)
    found = {note.name for note in ahead.trace(plan)[0].found.values()}
    assert {"_gguf_few", "_gguf_tile", "_gguf_rows"} <= found and not unforetold(plan, steps=10)


def test_layers_of_each_combination_of_gguf_types_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def depths(*kinds: str) -> tuple[int, int]:
        names = {f"blk.{number}.ffn_down.weight": SimpleNamespace(kind=kind) for number, kind in enumerate(kinds)}
        file = SimpleNamespace(tensors={"output.weight": SimpleNamespace(kind="Q6_K"), **names})
        monkeypatch.setattr(ahead.GGUFFile, "open", lambda path: file)
        return ahead.depths(small_plan(gguf="some.gguf"))

    assert depths(*["Q4_K"] * 30) == ahead.LAYERS == ahead.depths(small_plan())
    assert depths(*["Q6_K"] * 4, *["Q4_K", "Q4_K", "Q6_K"] * 8) == (5, 8)
    assert depths(*["Q6_K"] * 10, *["Q4_K", "Q6_K"] * 8) == (11, 11)


EXPERTS: dict[str, tuple[str, dict[str, Any], Any, bool, dict[str, Any], tuple[str, ...]]] = {
    "gpt-oss": (
        "gpt_oss", {"intermediate_size": 64}, packers.mxfp4_stack, True, {"quant_method": "mxfp4"}, ("_grouped_any",),
    ),
    "gptq": (
        "qwen3_moe", {"moe_intermediate_size": 64}, packers.gptq, False,
        {"quant_method": "gptq", "bits": 4, "group_size": 32}, ("_grouped_any", "_few_up_any", "_gemm_int4"),
    ),
    "mxfp4": (
        "qwen3_moe", {"moe_intermediate_size": 64}, packers.mxfp4_matrix, False,
        {"quant_method": "compressed-tensors", "config_groups": {}}, ("_grouped_any", "_few_down_any", "_gemm_mxfp4"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPERTS)
def test_kernels_of_experts_of_4_bits_are_foretold(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(AHEAD, "capability", 90)
    name, sizes, pack, named, config, wanted = EXPERTS[case]
    path = tiny_checkpoint(name, tmp_path / "made", hidden_size=64, head_dim=16, **sizes)
    plan, refusal = told(packers.quantised(path, tmp_path, pack, config, named=named)[0], monkeypatch)
    assert refusal is None and plan.stored is not None
    found = {note.name: note for note in ahead.trace(plan)[0].found.values()}
    assert {*wanted} <= set(found) and found["_grouped_any"].kwargs["WIDTH"] > 0
    assert not unforetold(plan, steps=10)


@pytest.mark.parametrize("method,kernel", [("fp8", "_gemm_few"), ("int4", "_gemm_int4"), ("int8", "_gguf_few")])
def test_so_are_those_of_weights_that_are_rounded(
    method: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(AHEAD, "capability", 90)
    plan, refusal = told(tiny_checkpoint("llama", tmp_path, **SIZES), monkeypatch, quantization=method)
    assert refusal is None and plan.quantization == method
    assert kernel in {note.name for note in ahead.trace(plan)[0].found.values()}
    assert not unforetold(plan, steps=10)


def test_scales_of_a_float8_cache_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    path = tiny_checkpoint("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    for name, scale in (("k", torch.tensor(0.5)), ("v", torch.tensor([0.5, 0.25]))):
        tensors[f"model.layers.1.self_attn.{name}_scale"] = scale
    save_file(tensors, path / "model.safetensors")
    plan, _ = told(path, monkeypatch, kv_cache_dtype="fp8_e4m3")
    assert plan.kv_dtype == "float8_e4m3fn" and set(plan.scales) == {1}
    assert not told(path, monkeypatch)[0].scales


def test_a_table_without_such_kernels_and_steps_of_others_are_refused() -> None:
    nothing: Any = None
    plan, why = foretold.plan_of(nothing, nothing, nothing, Ops(), torch.float32, (1, 1), "")
    assert plan == {} and why is not None and "'reference'" in why
    _, why = foretold.plan_of(nothing, nothing, nothing, table.table(), torch.float32, (1, 1), "others' code")
    assert why == "others' code: which kernels it needs shows when it runs"


@pytest.mark.slow
@pytest.mark.some(2)
@pytest.mark.parametrize("name", ["bert", "qwen3", "qwen3_moe", "modernbert", "deberta_v2"])
@pytest.mark.parametrize("kind", ["triton", "invariant"])
def test_no_text_of_a_model_that_does_not_generate_does(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of texts are told as those of steps are, and the texts that among them launch all."""
    pytest.importorskip("transformers")
    path = tiny_checkpoint(name, tmp_path)
    plan, refusal = told(path, monkeypatch, kind, task="embed", load_format="dummy")
    assert refusal is None and plan.pooled is not None and plan.ops == kind
    plan = msgspec.structs.replace(plan, chunk=2048)
    found, shapes = ahead.trace(plan)
    ops = shapes_only(table.table() if kind == "triton" else table.invariant_table())
    with torch.inference_mode(), kernels.Notes().taken():
        model = load_pooled(
            describe(str(path), "dummy", task="embed"), BuildContext(ops, torch.bfloat16, torch.device("meta"))
        )
    compiled: Any = SimpleNamespace(tally=Tally(), directory=tmp_path)
    done = {
        "shapes": shapes,
        "kernels": len(found.found),
        "cached": 0,
        "seconds": 1.0,
        "slowest": ["x", 1],
        "errors": [],
    }
    service: Any = SimpleNamespace(wait=lambda seconds: (done, ""))
    warming, decisions = warm.Warming(compiled, service), list[Decision]()
    notes = kernels.Notes()
    with torch.inference_mode(), notes.taken():
        warming.finish_texts(partial(run_texts, model, ops), 1300, decisions)
        assert set(notes.found) <= set(found.found) and len(notes.found) > len(found.found) // 2
        random = np.random.default_rng(0)
        for _ in range(40):
            most = int(random.integers(1, 256))
            run_texts(model, ops, [int(random.integers(1, most + 1)) for _ in range(int(random.integers(1, 6)))])
    assert set(notes.found) <= set(found.found) and len(shapes) < 40
    assert "compiled beside the loading in 1.0 s" in decisions[0].reason
    assert len(found.found) > 1 or (name != "qwen3" and kind == "triton")


def test_texts_are_read_one_after_another_where_nobody_has_told(tmp_path: Path) -> None:
    compiled: Any = SimpleNamespace(tally=Tally(), directory=tmp_path)
    warming, decisions, read = warm.Warming(compiled, None, "no reason"), list[Decision](), list[list[int]]()
    warming.finish_texts(read.append, 40, decisions)
    assert read[0] == [1] and read[-1] == [1, 1] and [40] in read and warming.told()["steps"] == 41
    assert decisions[0].reason.startswith("not compiled beside the loading: no reason")
