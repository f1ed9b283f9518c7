"""`phloem bench shapes`: what steps read and keep, which layers are recurrent, and that the figures fit together."""

from __future__ import annotations

from typing import Any

import pytest
from linear_cases import needs_native

from phloem.bench import shapes
from phloem.checkpoint.families import FAMILIES
from phloem.core.errors import BadRequest

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 64, "vocab_size": 512}
KIMI = {
    **shapes.SHAPES["kimi_linear"], **SMALL, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32,
    "linear_num_heads": 2, "linear_head_dim": 32, "moe_intermediate_size": 64,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip


def test_every_shape_is_of_a_family_that_is_served() -> None:
    assert set(shapes.SHAPES) == set(shapes.CLASSES) <= set(FAMILIES.names())


@needs_native
@pytest.mark.slow
def test_a_tiny_hybrid_is_made_and_measured() -> None:
    options = shapes.Options(contexts=(32, 96), steps=4, turns=1)
    found = shapes.measure("kimi_linear", KIMI, options)
    short, long = found["contexts"]
    # Three layers' states, float32, read and written: 2 heads of 32 x 32, and the last 3 inputs of q, k and v.
    assert short["step_bytes"]["states"] == long["step_bytes"]["states"] == 3 * 2 * 4 * (2 * 32 * 32 + 3 * 64 * 3)
    # One layer's latents, of the warm steps and half of those that count too.
    per_token = long["step_bytes"]["kv"] // (96 + 18)
    assert short["step_bytes"]["kv"] == per_token * (32 + 18) and per_token >= 2 * (32 + 32)
    # Two timings, each on its own: which is shorter on a machine that others use says nothing.
    assert short["recurrent_ms"] > 0 and short["step_ms"] > 0
    assert found["growth"] == pytest.approx(long["step_ms"] / short["step_ms"])
    total = sum(long["step_bytes"].values())
    assert long["floor_ms"] == pytest.approx(total / long["read_gb_per_s"] / 1e6)


@needs_native
@pytest.mark.slow
def test_a_model_without_recurrent_layers_has_no_part_of_them() -> None:
    shape = {**shapes.SHAPES["deepseek_v3"], **SMALL, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"kv_lora_rank": 32, "moe_intermediate_size": 64}
    found = shapes.measure("deepseek_v3", shape, shapes.Options(contexts=(32,), steps=4, turns=1))
    assert found["recurrent_growth"] is None and found["contexts"][0]["recurrent_ms"] is None
    size = found["contexts"][0]["step_bytes"]
    assert size["states"] == 0 and size["experts"] > 0 and found["contexts"][0]["of_floor"] > 0


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--contexts", "0"]])
def test_nothing_is_measured_of_no_steps(argv: list[str]) -> None:
    with pytest.raises(BadRequest, match="at least 1"):
        shapes.main(argv)


def test_shapes_that_are_not_known_are_named() -> None:
    with pytest.raises(BadRequest, match="unknown: gpt5"):
        shapes.main(["--shapes", "gpt5"])
