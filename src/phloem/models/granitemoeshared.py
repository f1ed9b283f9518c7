"""Granite MoE with a dense block beside the experts of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._layer import MLP
from phloem.models.granite import alike, multiplied
from phloem.models.granitemoe import chosen
from phloem.models.granitemoehybrid import Beside

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

DEFAULTS = {"shared_intermediate_size": 0}
# Granite MoE without a shared block is written under this name too.
GGUF = {
    "architecture": "granitemoe",
    "hf_class": "GraniteMoeSharedForCausalLM",
    "keys": {
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "shared_intermediate_size": ("expert_shared_feed_forward_length", 0),
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "attention_multiplier": "attention.scale",
        "logits_scaling": "logit_scale",
    },
    "config": {"projections_apart": True},
    "names": {
        "block_sparse_moe.router.layer": "ffn_gate_inp",
        "block_sparse_moe.experts.{}.gate_proj": "ffn_gate_exps",
        "block_sparse_moe.experts.{}.up_proj": "ffn_up_exps",
        "block_sparse_moe.experts.{}.down_proj": "ffn_down_exps",
        "shared_mlp.gate_proj": "ffn_gate_shexp",
        "shared_mlp.up_proj": "ffn_up_shexp",
        "shared_mlp.output_linear": "ffn_down_shexp",
    },
    "turned": ("q_proj", "k_proj"),
}
TINY = {
    "head_dim": None,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "shared_intermediate_size": 40,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.25,
}
VARIANTS = {"alone": {"shared_intermediate_size": 0, "tie_word_embeddings": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    sparse, inner, activation = chosen(config), config["shared_intermediate_size"], config.get("hidden_act", "silu")
    fused = "" if config.get("projections_apart") else "input_linear"
    dense = MLP(inner, activation, fused=fused, name="shared_mlp", down="output_linear")
    return multiplied(config, ctx, max_positions, alike(config, Beside(sparse, dense) if inner else sparse))
