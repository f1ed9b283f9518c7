"""Apertus: Llama with q and k normalised by head, and two plain matrices with a learned activation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_attention
from phloem.models._layer import LayerKind, Plain

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"hidden_act": "xielu", "rope_theta": 12000000.0}
GGUF = {
    "architecture": "apertus",
    "hf_class": "ApertusForCausalLM",
    "config": {"hidden_act": "xielu"},
    "names": {"attention_layernorm": "attn_norm", "feedforward_layernorm": "ffn_norm"},
    "numbers": {
        "mlp.act_fn.alpha_p": "xielu.alpha_p",
        "mlp.act_fn.alpha_n": "xielu.alpha_n",
        "mlp.act_fn.beta": "xielu.beta",
        "mlp.act_fn.eps": "xielu.eps",
    },
}
TINY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
VARIANTS = {"bias": {"attention_bias": True, "num_key_value_heads": 4}}

_NORMS = ("attention_layernorm", "feedforward_layernorm")


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    feed = Plain(config["intermediate_size"], config["hidden_act"])
    kind = LayerKind(usual_attention(config, qk_norm="head"), feed, norm_names=_NORMS)
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
