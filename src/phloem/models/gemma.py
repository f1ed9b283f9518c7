"""Gemma 1: norms stored as their distance from 1, scaled embeddings, a tied head, GeLU in its gates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}
GGUF = {
    "architecture": "gemma",
    "hf_class": "GemmaForCausalLM",
    "keys": {"head_dim": ("attention.key_length", 256)},
    "config": {"hidden_act": "gelu_pytorch_tanh"},
    "norm_shift": 1.0,
}
TINY = {}
VARIANTS = {"one-kv-head": {"num_key_value_heads": 1}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    # The first files name the exact GeLU; the models were trained with the approximate one, whatever `hidden_act` says.
    kind = LayerKind(usual_attention(config), usual_mlp(config, activation="gelu_pytorch_tanh"))
    config_of_all = usual(
        config,
        layers=each_layer(config, lambda n: kind),
        tied=bool(config.get("tie_word_embeddings", True)),
        norm_shift=1.0,
        embed_scale=config["hidden_size"] ** 0.5,
    )
    return Decoder(ctx, config_of_all, max_positions)
