"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v, and a window over the upper layers where that is switched on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, LayerKind, layer_types, usual

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int, **differences: Any) -> Decoder:
    base = usual(config)
    window = int(config.get("sliding_window") or 0) if config.get("use_sliding_window") else 0
    first = int(config.get("max_window_layers", 0))
    sliding = layer_types(config, [bool(window) and number >= first for number in range(len(base.layers))])
    rope = rope_spec(config, base.head_size)
    layers = tuple(LayerKind(rope, window if local else 0) for local in sliding)
    differences = {"qkv_bias": True, "out_bias": False, **differences}
    return Decoder(ctx, usual(config, layers=layers, **differences), max_positions)
