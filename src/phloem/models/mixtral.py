"""Mixtral: Mistral with a sparse block in every layer, the weights of a token's experts summing to 1."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.layers.moe import ExpertNames, softmax_experts
from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_attention
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"rope_theta": 1e6}
GGUF = {
    "architecture": "llama",
    "sparse": True,
    "hf_class": "MixtralForCausalLM",
    "keys": {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    "names": {
        "block_sparse_moe.gate": "ffn_gate_inp",
        "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
        "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
        "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
    },
    "turned": ("q_proj", "k_proj"),
}
TINY = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24, "sliding_window": 9}
VARIANTS = {"no-window": {"sliding_window": None, "num_experts_per_tok": 3}}

_NAMES = ExpertNames(gate="experts.{}.w1.weight", up="experts.{}.w3.weight", down="experts.{}.w2.weight")


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    window = int(config.get("sliding_window") or 0)
    sliding = layer_types(config, [bool(window)] * config["num_hidden_layers"])
    sizes = config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"]
    experts = replace(softmax_experts(*sizes, config.get("hidden_act", "silu"), renormalise=True), names=_NAMES)

    def layer(n: int) -> LayerKind:
        attention = usual_attention(config, window=window if sliding[n] else 0)
        return LayerKind(attention, Experts(experts, "block_sparse_moe"))

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
