"""Scales of a float8 KV cache: found in checkpoints, told where they are missing, and honoured from the door on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_support import CPU, PROMPT, Engine, check_modes
from safetensors.torch import load_file, save_file

from phloem.checkpoint.describe import describe
from phloem.checkpoint.kv_scheme import kv_scheme, only_kv
from phloem.core.batch import Admission, Batch
from phloem.core.config import Config
from phloem.core.errors import ModelLoadError
from phloem.core.memory import Latent, Paged, State
from phloem.core.request import SamplingParams
from phloem.engine import worker
from phloem.kvcache.pool import KVScales
from phloem.models._scales import scale_of, scaled_pools
from phloem.testing.checkpoints import tiny_checkpoint

TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
STATE = State((((4,), "float32"),))
PACKED = {"quant_method": "compressed-tensors", "kv_cache_scheme": TENSOR, "config_groups": {}}
K, V = 8.0, 5.0  # powers and no powers of two: both must come back


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.k_scale", (3, "k")),
        ("model.layers.12.self_attn.attn.v_scale", (12, "v")),
        ("model.layers.0.self_attn.k_proj.k_scale", (0, "k")),
        ("model.layers.0.self_attn.v_proj.v_scale", (0, "v")),
        ("model.layers.0.self_attn.qkv_proj.k_scale", (0, "k")),
        ("model.layers.0.self_attn.k_proj.output_scale", (0, "k")),
        ("model.layers.0.self_attn.kv_scale", (0, "kv")),
        ("model.layers.0.self_attn.k_proj.weight_scale", None),
        ("model.layers.0.self_attn.k_proj.input_scale", None),
        ("model.layers.0.self_attn.q_proj.output_scale", None),
        ("model.layers.0.mlp.k_scale", None),
    ],
)
def test_names_of_scales(name: str, place: tuple[int, str] | None) -> None:
    assert scale_of(name) == place


@pytest.mark.parametrize(
    ("quantization", "scheme", "alone"),
    [
        (None, None, False),
        ({"quant_method": "awq"}, None, False),
        (PACKED, "fp8_e4m3", True),
        ({**PACKED, "config_groups": {"group_0": {}}}, "fp8_e4m3", False),
        ({**PACKED, "kv_cache_scheme": {**TENSOR, "type": "int"}}, "int8", True),
        ({**PACKED, "kv_cache_scheme": {**TENSOR, "dynamic": True}}, "dynamic float8", True),
        ({**PACKED, "kv_cache_scheme": None}, None, False),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "fp8_e4m3", True),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8_e4m3", False),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}, "NVFP4", True),
    ],
)
def test_schemes(quantization: dict[str, Any] | None, scheme: str | None, alone: bool) -> None:
    assert kv_scheme(quantization) == scheme
    assert only_kv(quantization or {}) is alone


GROW = {"k_proj": 700.0, "q_proj": 1 / 700, "v_proj": 600.0, "o_proj": 1 / 600}
GROW_LATENTS = {"kv_a_layernorm": 700.0, "kv_b_proj": 1 / 700}


def with_scales(
    path: Path, pattern: str, factor: float = 1.0, scheme: dict[str, Any] | None = PACKED, family: str = "llama"
) -> Path:
    """A tiny model whose keys and values are far beyond 448, and scales for them under names of this pattern.

    Keys grow with their projection, and queries shrink likewise; values too, and the output projection shrinks. Latents
    grow with their norm, and what makes keys and values of them shrinks.
    """
    tiny_checkpoint(family, path)
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    grow = GROW if family == "llama" else GROW_LATENTS
    for name in tensors:
        part = name.split(".")[-2]
        if part in grow:
            tensors[name] = tensors[name] * grow[part]
    for layer in range(3):
        for kind, value in (("k", K), ("v", V)):
            if pattern:
                name = f"model.layers.{layer}.self_attn." + pattern.replace("?", kind)
                tensors[name] = torch.tensor(value * factor)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | ({"quantization_config": scheme} if scheme else {})))
    return path


def logprobs(path: Path, **settings: Any) -> tuple[list[float], worker.Built]:
    """Log probabilities of a prompt of 30 tokens and of one decoded token."""
    values = {"model_path": str(path), "dtype": "float32", "max_total_tokens": 256, "ops": "reference", **settings}
    built = worker.build(Config.from_flat(values), describe(str(path)), lambda phase, seconds: None)
    tokens = np.arange(40, 70, dtype=np.int32)
    admission = Admission(0, "a", SamplingParams(temperature=0.0), 0, tokens, 30, return_logprob=True)
    one = np.zeros(1, np.int32)
    pages = (np.arange(1, 4, dtype=np.int32)[None],)
    targets = {0: np.append(tokens[1:], -1).astype(np.int32)}
    first = Batch(0, one, one + 30, one, tokens, pages, one + 1, [admission], prompt_targets=targets)
    second = Batch(1, one, one + 1, one + 30, np.array([7], np.int32), pages, one + 1)
    given = [built.runner.launch(batch).result() for batch in (first, second)]
    built.runner.close()
    prompt = [item.token for item in given[0].prompt_logprobs[0]]
    return [*prompt, given[0].logprobs[0][0].token, given[1].logprobs[0][0].token], built


def distance(a: list[float], b: list[float]) -> float:
    return float(np.abs(np.array(a) - np.array(b)).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "scheme"),
    [
        ("?_scale", PACKED),
        ("?_proj.?_scale", {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}),
        ("attn.?_scale", None),
    ],
)
def test_scales_of_a_checkpoint_reach_the_cache(
    tmp_path: Path, pattern: str, scheme: dict[str, Any] | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = with_scales(tmp_path / "scaled", pattern, scheme=scheme)
    exact, _ = logprobs(path)
    with caplog.at_level(logging.WARNING):
        got, built = logprobs(path, kv_cache_dtype="fp8_e4m3")
    assert not caplog.records
    assert built.runner.pool.scales[2].k_values == (K,) and built.runner.pool.dtype == torch.float8_e4m3fn
    told = next(item for item in built.decisions if item.name == "kv_cache_dtype")
    assert told.value == "float8_e4m3fn" and "for 3 of 3 layers" in told.reason
    bare = with_scales(tmp_path / "bare", "", scheme=scheme)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        cut, _ = logprobs(bare, kv_cache_dtype="fp8_e4m3")
    assert "no k_scale and v_scale for 3 of 3 layers" in caplog.records[0].getMessage()
    assert "beyond 448 are cut off" in caplog.records[0].getMessage()
    assert distance(got, exact) < 0.1 and distance(cut, exact) > 3 * distance(got, exact)


@pytest.mark.slow
def test_a_latent_has_one_scale_the_larger_of_its_layer_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = with_scales(tmp_path / "scaled", "?_scale", family="youtu")
    exact, _ = logprobs(path)
    with caplog.at_level(logging.WARNING):
        got, built = logprobs(path, kv_cache_dtype="fp8_e4m3")
    assert not caplog.records
    assert built.runner.pool.keys[0].dtype == torch.float8_e4m3fn
    assert [built.runner.pool.scales[layer].k_values for layer in range(3)] == [(K,)] * 3
    told = next(item for item in built.decisions if item.name == "kv_cache_dtype")
    assert "for 3 of 3 layers" in told.reason
    with caplog.at_level(logging.WARNING):
        cut, _ = logprobs(with_scales(tmp_path / "bare", "", family="youtu"), kv_cache_dtype="fp8_e4m3")
    assert "no k_scale and v_scale for 3 of 3 layers" in caplog.records[0].getMessage()
    assert np.isfinite(cut).all(), "what is too large is cut off, and no NaN"
    assert distance(got, exact) < 0.1 and distance(cut, exact) > 3 * distance(got, exact)


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
def test_scales_of_latents_change_no_logits(family: str, tmp_path: Path) -> None:
    """Of powers of two, in a cache that loses nothing by them: in chunks, on a prefix, several rows at once."""
    path = tiny_checkpoint(family, tmp_path)
    whole = Engine(path).whole(PROMPT)

    class Scaled(Engine):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            latents = [pool for pool, spec in enumerate(self.pool.memory) if isinstance(spec, Latent)]
            self.pool.scales = {pool: KVScales((8.0,), (8.0,), CPU) for pool in latents}
            assert latents

    check_modes(path, whole, Scaled)
    engine = Scaled(path)
    engine.whole(PROMPT)
    layer = next(iter(engine.pool.scales))
    plain = Engine(path)
    plain.whole(PROMPT)
    assert torch.equal(engine.pool.keys[layer] * 8, plain.pool.keys[layer]) and plain.pool.keys[layer].any()


def test_scales_are_those_of_the_layer_s_pages() -> None:
    """Which are not numbered as layers are, where these keep several things or none."""
    memory = [Paged(2, 8, 8), STATE, Paged(2, 8, 8), STATE, Latent(8, 4), Latent(4, 0), Latent(8, 4), Latent(8, 4)]
    layers = [range(2), range(2, 4), range(4, 4), range(4, 6), range(6, 8)]
    assert scaled_pools(memory, layers) == {0: 0, 1: 2, 3: 4}


def test_auto_keeps_the_type_of_the_model_and_says_what_the_checkpoint_has(tmp_path: Path) -> None:
    _, built = logprobs(with_scales(tmp_path, "?_scale"))
    told = next(item for item in built.decisions if item.name == "kv_cache_dtype")
    assert told.value == "float32" and "--kv-cache-dtype fp8_e4m3" in told.reason and not built.runner.pool.scales


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_scale_that_cannot_be_is_refused(tmp_path: Path, factor: float) -> None:
    with pytest.raises(ModelLoadError, match="no scale can be"):
        logprobs(with_scales(tmp_path, "?_scale", factor), kv_cache_dtype="fp8_e4m3")


def test_scales_for_another_type_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scheme = {**PACKED, "kv_cache_scheme": {**TENSOR, "type": "int"}}
    with caplog.at_level(logging.WARNING):
        _, built = logprobs(with_scales(tmp_path, "?_scale", scheme=scheme), kv_cache_dtype="fp8_e4m3")
    assert not built.runner.pool.scales and "type int8" in caplog.records[0].getMessage()


def test_weights_in_a_format_that_is_not_read_are_still_refused(tmp_path: Path) -> None:
    scheme = {**PACKED, "quant_method": "quark", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    with pytest.raises(ModelLoadError, match="'quark' is not supported"):
        describe(str(with_scales(tmp_path, "?_scale", scheme=scheme)))
