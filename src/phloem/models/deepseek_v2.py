"""DeepSeek V2 and V2-Lite: latent attention, softmax routing whose weights are scaled and not renormalised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertsConfig
from phloem.models._common import Decoder, usual, usual_mlp
from phloem.models._layer import Experts
from phloem.models.deepseek_v3 import sparse_layers

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.0,
    "rope_interleave": True,
}
GGUF = {
    "architecture": "deepseek2",
    "hf_class": "DeepseekV2ForCausalLM",
    "keys": {
        "q_lora_rank": ("attention.q_lora_rank", 0),
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_rope_head_dim": "rope.dimension_count",
        "head_dim": "rope.dimension_count",
        "n_routed_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "n_shared_experts": "expert_shared_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "first_k_dense_replace": "leading_dense_block_count",
        "routed_scaling_factor": ("expert_weights_scale", 1.0),
        "norm_topk_prob": ("expert_weights_norm", False),
        "n_group": ("expert_group_count", 1),
        "topk_group": ("expert_group_used_count", 1),
    },
    "config": {"topk_method": "group_limited_greedy", "rope_interleave": True},
    "names": {
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.kv_b_proj": "attn_kv_b",
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
        "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
    },
}
TINY = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.0,
}
VARIANTS = {
    "groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": 24},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 16,
        }
    },
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    method = config["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ModelLoadError(f"topk_method {method!r}: known are greedy and group_limited_greedy")
    if config.get("norm_topk_prob"):
        raise ModelLoadError("norm_topk_prob: no published model of the family renormalises, and it is not served")
    grouped = method == "group_limited_greedy"
    router = RouterSpec(
        config["num_experts_per_tok"],
        scale=float(config["routed_scaling_factor"]),
        groups=config["n_group"] if grouped else 1,
        keep=config["topk_group"] if grouped else 1,
        group_best=1,
    )
    inner = config["moe_intermediate_size"]
    shared = None
    if config.get("n_shared_experts"):
        shared = usual_mlp(config, inner_size=inner * config["n_shared_experts"], name="shared_experts")
    experts = Experts(ExpertsConfig(config["n_routed_experts"], inner, router), shared=shared)
    return Decoder(ctx, usual(config, layers=sparse_layers(config, experts)), max_positions)
