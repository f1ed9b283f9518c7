"""OLMo 1: Llama with layer norms that have no weights, and with bounds on q, k and v."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "olmo",
    "hf_class": "OlmoForCausalLM",
    "keys": {"layer_norm_eps": ("attention.layer_norm_epsilon", 1e-5), "clip_qkv": ("attention.clamp_kqv", 0.0)},
    "turned": ("q_proj", "k_proj"),
}
TINY = {"head_dim": None, "clip_qkv": 0.8}
VARIANTS = {"unbounded": {"clip_qkv": None, "tie_word_embeddings": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    kind = LayerKind(usual_attention(config, clip=float(config.get("clip_qkv") or 0.0)), usual_mlp(config))
    eps = float(config.get("layer_norm_eps", 1e-5))
    config_of_all = usual(config, layers=each_layer(config, lambda n: kind), eps=eps, norms="layer-weightless")
    return Decoder(ctx, config_of_all, max_positions)
