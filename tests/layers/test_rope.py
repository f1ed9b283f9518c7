"""Stretched rotations against transformers' own functions."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from phloem.core.errors import ModelLoadError
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.layers.rope import Rope, inverse_frequencies, rope_spec

CTX = BuildContext(Ops(), torch.float32, torch.device("cpu"))
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5, 3.0, 4.0, 8.0],
    "short_factor": [1.0, 1.25, 1.5, 1.75],
}
CONFIG = {"max_position_embeddings": 256, "original_max_position_embeddings": 32, "rope_scaling": LONG}


def hf(kind: str, rope: dict[str, Any], **keys: Any) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = keys.pop("seq_len", None)
    config = LlamaConfig(
        head_dim=8, hidden_size=16, num_attention_heads=2, rope_parameters={"rope_type": kind, **rope}, **keys
    )
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), length)
    return inverse, scale


@pytest.mark.parametrize("context", [32, 33, 256])
def test_longrope_is_chosen_by_the_served_context(context: int) -> None:
    rope = {**LONG, "original_max_position_embeddings": 32}
    expected, scale = hf("longrope", rope, max_position_embeddings=256, seq_len=context)
    inverse, ours = inverse_frequencies(rope_spec(CONFIG, 8), context)
    torch.testing.assert_close(inverse, expected)
    assert ours == pytest.approx(scale)


def test_longrope_says_at_start_which_list_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "phloem.layers"):
        Rope(CTX, rope_spec(CONFIG, 8), 32)
        Rope(CTX, rope_spec(CONFIG, 8), 64)
    assert "short_factor for every position, because 32 tokens" in caplog.text
    assert "long_factor for every position, because 64 tokens" in caplog.text


def test_proportional_leaves_the_slow_pairs_alone() -> None:
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 2.0}
    expected, _ = hf("proportional", rope)
    spec = rope_spec({"rope_parameters": {"rope_type": "proportional", **rope}}, 8)
    assert spec.rotary_size == 8
    torch.testing.assert_close(inverse_frequencies(spec)[0], expected)


def test_alpha_stretches_the_base_for_good() -> None:
    spec = rope_spec({"rope_scaling": {"type": "dynamic", "alpha": 1000.0}, "rope_theta": 1e4}, 8)
    expected = 1.0 / ((1e4 * 1000 ** (8 / 6)) ** (torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(inverse_frequencies(spec)[0], expected)


def test_three_positions_that_agree_are_one() -> None:
    config = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    rope = Rope(CTX, rope_spec(config, 8), 16)
    positions = torch.tensor([3, 4, 9])
    plain, three = rope.at(positions), rope.at(positions.expand(3, -1))
    assert plain.cos_sin is rope.cos_sin
    assert torch.equal(three.cos_sin[three.positions], rope.cos_sin[positions])


def test_neighbours_are_paired_where_a_family_says_so() -> None:
    assert Rope(CTX, rope_spec({}, 8, interleaved=True), 4).at(torch.tensor([1])).interleaved
    assert not Rope(CTX, rope_spec({}, 8), 4).at(torch.tensor([1])).interleaved


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 0},
        {"rope_parameters": {"rope_theta": float("nan")}},
        {"rope_scaling": {"type": "linear", "factor": -4.0}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": "8"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": float("inf")}, "max_position_embeddings": 64},
    ],
)
def test_a_rotation_that_gives_no_numbers_is_refused_when_it_is_read(config: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match="expected a number above 0"):
        rope_spec(config, 8)
