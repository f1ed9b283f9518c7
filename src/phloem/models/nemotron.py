"""Nemotron 4 and Minitron: layer norms stored as their distance from 1, the square of ReLU, half of each head turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_attention
from phloem.models._layer import LayerKind, Plain

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"norm_eps": 1e-5, "partial_rotary_factor": 0.5}
GGUF = {
    "architecture": "nemotron",
    "hf_class": "NemotronForCausalLM",
    "keys": {"norm_eps": "attention.layer_norm_epsilon"},
    "config": {"hidden_act": "relu2"},
    "norm_shift": 1.0,
}
TINY = {}
VARIANTS = {"bias": {"attention_bias": True, "mlp_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    feed = Plain(config["intermediate_size"], config.get("hidden_act", "relu2"), bool(config.get("mlp_bias", False)))
    kind = LayerKind(usual_attention(config), feed)
    config_of_all = usual(
        config,
        layers=each_layer(config, lambda n: kind),
        eps=float(config["norm_eps"]),
        norms="layer",
        norm_shift=1.0,
    )
    return Decoder(ctx, config_of_all, max_positions)
