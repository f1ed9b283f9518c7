"""OLMo 2: norms behind attention and MLP instead of before them, and a norm over the whole projections of q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind
from phloem.models.olmo3 import build as windowed

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "olmo2",
    "hf_class": "Olmo2ForCausalLM",
    # With windows it is an OLMo 3.
    "keys": {
        "windows": ("attention.sliding_window", 0),
        "layer_types": ("attention.sliding_window_pattern", None),
    },
    "names": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
}
TINY = {"head_dim": None}
VARIANTS = {"bias": {"attention_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("windows"):
        return windowed({**config, "sliding_window": config["windows"]}, ctx, max_positions)
    kind = LayerKind(usual_attention(config, qk_norm="whole"), usual_mlp(config), norms="post")
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
