"""GLM-4.5 to 4.7: sigmoid routing with a correction, a dense block beside the experts, half of each head turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, Trunk, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind
from phloem.models.deepseek_v3 import grouped_experts

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "partial_rotary_factor": 0.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
}
GGUF = {
    "architecture": "glm4moe",
    "hf_class": "Glm4MoeForCausalLM",
    "keys": {
        "n_routed_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "n_shared_experts": "expert_shared_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "first_k_dense_replace": "leading_dense_block_count",
        "routed_scaling_factor": "expert_weights_scale",
        "norm_topk_prob": ("expert_weights_norm", True),
        "scoring_func": ("expert_gating_func", 2),  # sigmoid
        "num_nextn_predict_layers": ("nextn_predict_layers", 0),
    },
    "config": {"n_group": 1, "topk_group": 1},
    "flags": {"use_qk_norm": "attn_q_norm.weight"},
    "names": {
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
        "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        "post_attention_layernorm": "post_attention_norm",
    },
}
TINY = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "attention_bias": True,
    "routed_scaling_factor": 2.5,
}
VARIANTS = {
    "groups": {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "use_qk_norm": False, "norm_topk_prob": False}
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    experts = grouped_experts(config)
    attention = usual_attention(config, qk_norm="head" if config.get("use_qk_norm") else "", out_bias=False)

    def layer(n: int) -> LayerKind:
        dense = n < config["first_k_dense_replace"]
        return LayerKind(attention, usual_mlp(config) if dense else experts)

    return Trunk(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
