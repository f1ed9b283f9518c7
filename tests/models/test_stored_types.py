"""Stored numbers that are no weights by themselves are refused, wherever they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_support import PROMPT, Engine, close, edited

from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError
from phloem.models._stored import unused_scales
from phloem.testing.checkpoints import tiny_gguf

DOWN = "model.layers.1.mlp.down_proj"


def quantised(kind: torch.dtype, scale: str | None) -> Any:
    def change(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        peak = stored[f"{DOWN}.weight"].abs().max()
        stored[f"{DOWN}.weight"] = (stored[f"{DOWN}.weight"] / peak * 127).to(kind)
        return stored if scale is None else {**stored, f"{DOWN}.{scale}": (peak / 127).reshape(1)}

    return change


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int16, torch.uint8])
def test_a_low_type_that_nothing_claims_is_refused(made: Any, tmp_path: Path, kind: torch.dtype) -> None:
    path = edited(made("llama")[0], tmp_path / "x", quantised(kind, None))
    with pytest.raises(ModelLoadError, match=rf"1 tensors are in a type .*: {DOWN}.weight is [FIU]"):
        Engine(path)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "SCB", "input_scale", "weight.absmax"])
def test_a_scale_that_nobody_uses_is_refused(made: Any, tmp_path: Path, scale: str) -> None:
    for number, kind in enumerate((torch.float8_e4m3fn, torch.bfloat16)):
        path = edited(made("llama")[0], tmp_path / f"{number}", quantised(kind, scale))
        with pytest.raises(ModelLoadError, match=rf"1 tensors belong to weights in a format .*: {DOWN}.{scale}"):
            Engine(path)


def test_scales_are_known_by_the_names_of_all_formats() -> None:
    ends = "weight_scale_2 weight_zero_point g_idx qweight qzeros scales weight_packed weight_shape weight_global_scale"
    names = [f"x.{end}" for end in ends.split()] + ["mlp.experts.gate_up_proj_blocks", "mlp.experts.down_proj_scales"]
    others = ["x.weight", "x.bias", "norm.weight", "extra", "rescale.weight", "self_attn.q_scale"]
    assert unused_scales([*others, *names]) == names


def test_scales_for_attention_in_8_bits_are_only_left_out(made: Any, tmp_path: Path) -> None:
    path, theirs = made("llama")
    more = {f"model.layers.0.self_attn.{name}_scale": torch.ones(1) for name in ("q", "k", "v", "attn.q", "prob")}
    changed = edited(path, tmp_path / "x", lambda stored: {**stored, **more})
    close(Engine(changed).whole(PROMPT), theirs)


def test_a_format_that_only_the_second_file_names_is_refused(made: Any, tmp_path: Path) -> None:
    path, theirs = made("llama")
    changed = edited(path, tmp_path / "x", quantised(torch.float8_e4m3fn, "weight_scale"))
    (changed / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    (changed / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(ModelLoadError, match=r"hf_quant_config.json: quantization: ModelOpt 'W4A8_AWQ' is not read"):
        Engine(changed)
    plain = edited(path, tmp_path / "y")
    algo = {"quant_algo": None, "kv_cache_quant_algo": None}
    (plain / "hf_quant_config.json").write_text(json.dumps({"quantization": algo}))
    close(Engine(plain).whole(PROMPT), theirs)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_format_is_refused_wherever_it_is_named(made: Any, tmp_path: Path, key: str) -> None:
    said = {"quant_method": "hqq"}
    path = made("llama")[0]
    for number, change in enumerate(({key: said}, {"text_config": {key: said}})):
        with pytest.raises(ModelLoadError, match=f"config.json: {key} 'hqq' is not supported; save the model .*read"):
            describe(str(edited(path, tmp_path / f"{number}", **change)))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_live_updates_bring_weights_alone(made: Any, kind: torch.dtype) -> None:
    path, theirs = made("llama")
    engine = Engine(path)
    with pytest.raises(ModelLoadError, match=rf"{DOWN}.weight is (float8_e4m3fn|int8): push its values in 16 or 32"):
        engine.model.update_weights([(f"{DOWN}.weight", torch.ones(32, 64).to(kind))])
    with pytest.raises(ModelLoadError, match="no weight is called"):
        engine.model.update_weights([(f"{DOWN}.weight_scale", torch.ones(1))])
    close(engine.whole(PROMPT), theirs)


@pytest.mark.parametrize("name", ["blk.0.attn_q.scale", "blk.2.ffn_norm.bias", "rope_factors_long.weight"])
def test_parts_of_a_gguf_file_that_nobody_uses_are_refused(made: Any, tmp_path: Path, name: str) -> None:
    import gguf

    write = gguf.GGUFWriter.write_header_to_file

    def more(writer: Any) -> None:
        writer.add_tensor(name, np.ones(32, np.float32))
        write(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", more)
        file = tiny_gguf(made("llama")[0], tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=f"1 tensors would change the answers, and no layer uses them: {name}"):
        Engine(file)
