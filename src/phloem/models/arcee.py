"""Arcee (AFM): Llama whose feed-forward block is two plain matrices with the square of ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_attention
from phloem.models._layer import LayerKind, Plain

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "arcee",
    "hf_class": "ArceeForCausalLM",
    "config": {"hidden_act": "relu2"},
    "turned": ("q_proj", "k_proj"),
}
TINY = {}
VARIANTS = {"bias": {"attention_bias": True, "mlp_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    bias = bool(config.get("mlp_bias", False))
    feed = Plain(config["intermediate_size"], config.get("hidden_act", "relu2"), bias)
    kind = LayerKind(usual_attention(config), feed)
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
