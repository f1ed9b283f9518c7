"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with a sparse block beside a gated dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.moe import softmax_experts
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "qwen2moe",
    "hf_class": "Qwen2MoeForCausalLM",
    "keys": {
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "norm_topk_prob": ("expert_weights_norm", False),
    },
    "config": {"qkv_bias": True, "decoder_sparse_step": 1},
    "names": {
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    },
}
TINY = {
    "head_dim": None,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
VARIANTS = {
    "renormalised": {"norm_topk_prob": True, "tie_word_embeddings": True, "num_experts_per_tok": 3},
    "mixed": {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4, "qkv_bias": False},
}
DEFAULTS = {"qkv_bias": True, "decoder_sparse_step": 1, "norm_topk_prob": False}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("use_sliding_window"):
        raise ModelLoadError("use_sliding_window: no published model of the family has it, and it is not served")
    count = config["num_experts"]
    sizes = count, config["num_experts_per_tok"], config["moe_intermediate_size"]
    sparse = softmax_experts(*sizes, config.get("hidden_act", "silu"), bool(config["norm_topk_prob"]))
    shared = usual_mlp(config, inner_size=config["shared_expert_intermediate_size"], name="shared_expert")
    experts = Experts(sparse, shared=shared, shared_gate="shared_expert_gate")
    attention = usual_attention(config, qkv_bias=bool(config["qkv_bias"]), out_bias=False)

    def layer(n: int) -> LayerKind:
        dense = n in (config.get("mlp_only_layers") or ()) or (n + 1) % config["decoder_sparse_step"] or not count
        return LayerKind(attention, usual_mlp(config) if dense else experts)

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
