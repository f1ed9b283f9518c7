"""Qwen3: Qwen2 with a norm over each head of q and k instead of the bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_layer
from phloem.models.qwen2 import windows

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "qwen3",
    "hf_class": "Qwen3ForCausalLM",
    "also": ("qwen3vl",),  # whose tower is another file: it serves texts alone, to which all its axes are one
    "unheeded": ("rope.dimension_sections", "n_deepstack_layers"),
}
TINY = {}
VARIANTS = {"bias": {"attention_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    sizes = windows(config)
    layers = each_layer(config, lambda n: usual_layer(config, window=sizes[n], qk_norm="head"))
    return Decoder(ctx, usual(config, layers=layers), max_positions)
