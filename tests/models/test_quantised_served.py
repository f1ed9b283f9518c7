"""Quantised checkpoints through the whole engine: greedy tokens, a prefix hit, preemption, and what the start says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import packers
import pytest
from model_support import PROMPT, their_greedy

from phloem import Engine
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.kernels import native
from phloem.testing.checkpoints import tiny_checkpoint

COUNT = 24
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 2}
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "awq": (packers.awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "Q4_1"),
    "gptq": (packers.gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, "Q4_0"),
    "gptq-act-order": (
        partial(packers.gptq, act=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        "act-order",
    ),
    "pack-quantized": (
        partial(packers.packed_ints, symmetric=False),
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        "Q4_1",
    ),
    "fp8-blocks": (
        partial(packers.float8, by="block", scale_name="weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "float8",
    ),
}


def write(case: str, target: Path) -> tuple[Path, Path, str]:
    """A packed checkpoint, the plain one of the same values, and a word of the decision."""
    if case == "mxfp4":
        path = tiny_checkpoint("gpt_oss", target / "made", hidden_size=64, intermediate_size=32)
        config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        return *packers.quantised(path, target, packers.mxfp4_stack, config, named=True), "experts in one stack"
    pack, config, word = CASES[case]
    path = tiny_checkpoint("llama", target / "made", **SIZES)
    return *packers.quantised(path, target, pack, config), word


def decision(engine: Engine) -> tuple[str, str]:
    return next((value, why) for name, value, why in engine.get_server_info()["decisions"] if name == "weights")


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "mxfp4"])
def test_greedy_tokens_are_those_of_the_dequantised_model(case: str, tmp_path: Path) -> None:
    packed, plain, word = write(case, tmp_path)
    wanted = their_greedy(plain, PROMPT, COUNT)
    sampling = {"max_new_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 2048, "chunked_prefill_size": 16}
    with Engine(model_path=str(packed), ops="reference", page_size=4, debug_invariants=True, **settings) as engine:
        first: Any = engine.generate(input_ids=PROMPT, sampling_params=sampling)
        again: Any = engine.generate(input_ids=[PROMPT, PROMPT[:9], PROMPT], sampling_params=sampling)
        _, why = decision(engine)
    assert first["output_ids"] == wanted
    assert again[0]["output_ids"] == again[2]["output_ids"] == wanted
    assert again[0]["meta_info"]["cached_tokens"] >= len(PROMPT) // 4 * 4 - 4
    assert "unpacked to float32" in why and (word in why or word.startswith("Q4"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["awq", "gptq", "pack-quantized", "gptq-act-order"])
def test_the_start_says_what_is_kept_packed_and_why_not(case: str, tmp_path: Path) -> None:
    try:
        native.runtime()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    packed, _, word = write(case, tmp_path)
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_total_tokens": 512, "threads": 1, "device": "cpu"}
    with Engine(model_path=str(packed), **settings) as engine:
        answer: Any = engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 4, "temperature": 0})
        value, why = decision(engine)
    assert len(answer["output_ids"]) <= 4 and value.split()[0] in ("awq", "gptq", "compressed-tensors")
    kept = word.startswith("Q4")
    assert (f"14 matrices keep their bits as {word}" if kept else f"14 are unpacked to bfloat16: {word}") in why


def test_what_cannot_be_read_ends_the_start_with_its_name(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "made")
    config = {"quant_method": "awq", "version": "gemv"}
    packed, _ = packers.quantised(path, tmp_path, lambda name, tensor: None, config, named=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelLoadError, match="AWQ version 'gemv' is not read: convert it to version 'gemm'"):
        Engine(model_path=str(packed))
    with pytest.raises(ConfigError, match=r"awq is read from checkpoints, and this one is plain"):
        Engine(model_path=str(path), quantization="awq")
