"""Granite 3: Llama with multipliers on embeddings, attention logits, both branches of a layer, and output logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._layer import MakeFeed

GGUF = {
    "architecture": "granite",
    "hf_class": "GraniteForCausalLM",
    "keys": {
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "attention_multiplier": "attention.scale",
        "logits_scaling": "logit_scale",
    },
    "turned": ("q_proj", "k_proj"),
}
TINY = {
    "head_dim": None,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.25,
}
VARIANTS = {"tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}}


def alike(config: dict[str, Any], feed: MakeFeed) -> tuple[LayerKind, ...]:
    """Layers that all attend, with `feed` behind it."""
    scale, residual = float(config.get("attention_multiplier", 1.0)), float(config.get("residual_multiplier", 1.0))
    kind = LayerKind(usual_attention(config, scale=scale), feed, residual_scale=residual)
    return each_layer(config, lambda n: kind)


def multiplied(config: dict[str, Any], ctx: BuildContext, max_positions: int, layers: tuple[LayerKind, ...]) -> Decoder:
    """The decoder with Granite's multipliers around its layers."""
    if not config.get("logits_scaling", 1.0):
        raise ModelLoadError("logits_scaling is 0, and logits are divided by it")
    config_of_all = usual(
        config,
        layers=layers,
        embed_scale=float(config.get("embedding_multiplier", 1.0)),
        logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
    )
    return Decoder(ctx, config_of_all, max_positions)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return multiplied(config, ctx, max_positions, alike(config, usual_mlp(config)))
