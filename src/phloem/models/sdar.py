"""SDAR: Qwen3's layers, which see their own block both ways; it writes by diffusion, block after block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, usual, usual_layer

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"block_size": 4, "mask_token_id": 151669}
DIFFUSION = {"block": "block_size", "mask": "mask_token_id"}
TINY = {"mask_token_id": 2}
VARIANTS = {"bias": {"attention_bias": True}, "blocks-of-eight": {"block_size": 8}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    layer = usual_layer(config, block=config["block_size"], qk_norm="head")
    return Decoder(ctx, usual(config, layers=(layer,) * config["num_hidden_layers"]), max_positions)
