"""Phi-1, 1.5 and 2: one layer norm, of which attention and MLP both read, biases everywhere, also on the head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.models._common import Decoder, each_layer, usual, usual_attention
from phloem.models._layer import LayerKind, Plain

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"}
GGUF = {
    "architecture": "phi2",
    "hf_class": "PhiForCausalLM",
    "keys": {"layer_norm_eps": "attention.layer_norm_epsilon"},
    "config": {"hidden_act": "gelu_new"},
    "names": {"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
}
TINY = {"head_dim": None}
VARIANTS = {"one-kv-head": {"num_key_value_heads": 1}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("qk_layernorm"):
        raise ModelLoadError("qk_layernorm: no published Phi has it, and it is not served")
    feed = Plain(config["intermediate_size"], config["hidden_act"], True, ("fc1", "fc2"))
    kind = LayerKind(usual_attention(config, qkv_bias=True, out_bias=True, o_proj="dense"), feed, norms="parallel")
    config_of_all = usual(
        config,
        layers=each_layer(config, lambda n: kind),
        eps=float(config["layer_norm_eps"]),
        norms="layer",
        norm_name="final_layernorm",
        head_bias=True,
    )
    return Decoder(ctx, config_of_all, max_positions)
