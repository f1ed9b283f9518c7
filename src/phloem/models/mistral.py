"""Mistral: Llama with a sliding window over every layer, where the checkpoint has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, LayerKind, layer_types, usual

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    window = int(config.get("sliding_window") or 0)
    base = usual(config)
    rope = rope_spec(config, base.head_size)
    sliding = layer_types(config, [bool(window)] * len(base.layers))
    layers = tuple(LayerKind(rope, window if local else 0) for local in sliding)
    return Decoder(ctx, usual(config, layers=layers), max_positions)
