"""Qwen3: Qwen2 with a norm over each head of q and k instead of the bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models import qwen2

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    bias = bool(config.get("attention_bias", False))
    return qwen2.build(config, ctx, max_positions, qk_norm=True, qkv_bias=bias, out_bias=bias)
