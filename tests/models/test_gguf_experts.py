"""GGUF files of sparse models: stacked experts, sliced in the file, their bytes handed on as they are."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from linear_cases import needs_native
from model_support import PROMPT, Engine, close, reference
from safetensors.numpy import load_file, save_file

from phloem.checkpoint.describe import describe
from phloem.checkpoint.gguf_reader import GGUFFile
from phloem.core.errors import ModelLoadError
from phloem.kernels import native
from phloem.kernels.ops import Ops
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf

SIZES: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 5}


def as_stored(source: Path, target: Path, kind: str) -> Path:
    """The checkpoint whose matrices have the values that the GGUF file's have."""
    wanted = gguf.GGMLQuantizationType[kind]
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, values in tensors.items():
        if values.ndim > 1 and not name.endswith("mlp.gate.weight"):
            tensors[name] = np.ascontiguousarray(dequantize(quantize(values, wanted), wanted), np.float32)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_logits(kind: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path / "hf", **SIZES)
    file = tiny_gguf(path, tmp_path / "tiny.gguf", kind)
    theirs = reference(as_stored(path, tmp_path / "stored", kind), PROMPT)
    close(Engine(file).whole(PROMPT), theirs)
    if not needs_native.args[0]:
        ours = Engine(file, torch.bfloat16, ops=native.table(2), kv_dtype=torch.bfloat16).whole(PROMPT)
        # Of most tokens: one near a tie of two experts may take the other one.
        assert ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median() < 0.04


def test_bytes_of_each_expert_as_they_are_in_the_file(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path / "hf", **SIZES)
    file = tiny_gguf(path, tmp_path / "tiny.gguf", "Q4_1")
    dense = load_file(path / "model.safetensors")
    seen: dict[str, Any] = {}

    def prepare(parts: Any, dtype: torch.dtype, device: torch.device, experts: int) -> Any:
        assert len(parts) in (experts, 2 * experts) and experts == 5
        seen.update({part.name: part for part in parts})
        return Ops().prepare_experts(parts, dtype, device, experts)

    model = Engine(file, ops=dataclasses.replace(Ops(), prepare_experts=prepare)).model
    assert len(seen) == 2 * 5 * 3
    for name, part in seen.items():
        assert part.kind == "Q4_1"
        raw = part.raw()
        assert np.array_equal(raw, quantize(dense[name], gguf.GGMLQuantizationType.Q4_1).view(np.uint8))
        # A view of the mapped file: nothing was read to get it.
        assert raw.base is not None and not raw.flags.writeable and not raw.flags.owndata
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    want = dequantize(seen[name].raw(), gguf.GGMLQuantizationType.Q4_1)
    torch.testing.assert_close(model.get_weight(name), torch.from_numpy(want))


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_text"])
def test_gate_and_up_in_one_tensor(name: str, tmp_path: Path) -> None:
    """As converters leave them when they are asked to: the same numbers, and a tensor of an odd height is named."""
    path = tiny_checkpoint(name, tmp_path / "hf")
    add, held, cut = gguf.GGUFWriter.add_tensor, dict[str, Any](), False

    def joined(writer: Any, stored: str, tensor: Any, **rest: Any) -> None:
        match = re.fullmatch(r"(blk\.\d+\.)ffn_(gate|up)_exps\.weight", stored)
        if match is None:
            return add(writer, stored, tensor, **rest)
        other = held.pop(match[1], None)
        if other is None:
            held[match[1]] = (match[2], tensor)
            return None
        pair = {other[0]: other[1], match[2]: tensor}
        both = np.concatenate([pair["gate"], pair["up"]], 1)
        return add(writer, f"{match[1]}ffn_gate_up_exps.weight", both[:, 1:].copy() if cut else both, **rest)

    with pytest.MonkeyPatch.context() as patch:
        plain = Engine(tiny_gguf(path, tmp_path / "apart.gguf"))
        patch.setattr(gguf.GGUFWriter, "add_tensor", joined)
        close(Engine(tiny_gguf(path, tmp_path / "both.gguf")).whole(PROMPT), plain.whole(PROMPT))
        cut = True
        file = tiny_gguf(path, tmp_path / "odd.gguf")
    with pytest.raises(ModelLoadError, match="has no halves: expected gate and up"):
        Engine(file)


def test_metadata(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path / "hf", **SIZES)
    config = describe(str(tiny_gguf(path, tmp_path / "a.gguf"))).config
    wanted = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    assert wanted.items() <= config.items() and config["model_type"] == "qwen3_moe" and not config["mlp_only_layers"]


@needs_native
def test_a_live_update_of_one_expert(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path / "hf", **SIZES)
    engine = Engine(path, torch.float32, ops=native.table(2), kv_dtype=torch.bfloat16)
    name = "model.layers.0.mlp.experts.4.down_proj.weight"
    before = engine.whole(PROMPT)
    new = torch.randn(64, 32)
    assert not engine.model.update_weights([(name, new)])  # into the old memory: nothing moved
    assert torch.equal(engine.model.get_weight(name), new)
    other = name.replace("experts.4", "experts.3")
    assert torch.equal(engine.model.get_weight(other), torch.from_numpy(load_file(path / "model.safetensors")[other]))
    assert not torch.equal(engine.whole(PROMPT), before)


class Changed:
    """`tiny_gguf` with a writer that leaves out or changes things."""

    def __init__(self, patch: pytest.MonkeyPatch, drop: str = "", flat: str = "") -> None:
        add, key = gguf.GGUFWriter.add_tensor, gguf.GGUFWriter.add_key_value

        def add_tensor(writer: Any, name: str, tensor: Any, **rest: Any) -> None:
            if not re.search(drop or "$^", name):
                add(writer, name, tensor[0] if flat and flat in name else tensor, **rest)

        def add_key_value(writer: Any, name: str, *rest: Any, **more: Any) -> None:
            if not re.search(drop or "$^", name):
                key(writer, name, *rest, **more)

        patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
        patch.setattr(gguf.GGUFWriter, "add_key_value", add_key_value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": r"\.expert_count$"}, "no qwen3moe.expert_count"),
        ({"drop": r"blk\.1\.ffn_up_exps"}, "5 tensors are missing: model.layers.1.mlp.experts.0.up_proj"),
        ({"flat": "blk.0.ffn_gate_exps"}, "expected 5 stacked matrices"),
    ],
)
def test_what_is_missing_is_named(change: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path / "hf", **SIZES)
    with pytest.MonkeyPatch.context() as patch:
        Changed(patch, **change)
        file = tiny_gguf(path, tmp_path / "bad.gguf", "F16")
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        Engine(file)


def test_parts_of_a_tensor(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path / "hf", **SIZES)
    file = GGUFFile.open(tiny_gguf(path, tmp_path / "a.gguf"))
    whole = file.tensors["blk.1.ffn_down_exps.weight"]
    joined = np.concatenate([whole.part(expert).raw() for expert in range(5)])
    assert whole.part(2).shape == (64, 32) and np.array_equal(joined, whole.raw())
    for tensor, index in ((whole, 5), (whole, -1), (file.tensors["output_norm.weight"], 0)):
        with pytest.raises(IndexError):
            tensor.part(index)
