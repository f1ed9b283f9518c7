"""DeepSeek V3 and R1, Kimi K2: latent attention, sigmoid routing in groups with a correction, a dense block beside.

The scale of attention grows with a stretched rotation (`mscale_all_dim`), and neighbours are paired.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from phloem.kernels.specs import RouterSpec
from phloem.layers.latent import LatentSizes
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, Trunk, each_layer, usual, usual_mlp
from phloem.models._layer import Experts, Latents, LayerKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.layers.context import BuildContext

DEFAULTS = {
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "rope_interleave": True,
}
GGUF = {
    "architecture": "deepseek2",
    "hf_class": "DeepseekV3ForCausalLM",
    "sigmoid": True,
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
        "scoring_func": ("expert_gating_func", 2),
        "num_nextn_predict_layers": ("nextn_predict_layers", 0),
    },
    "config": {"rope_interleave": True},
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
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    },
}
TINY = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
VARIANTS = {
    "plain": {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "attention_bias": True, "rope_interleave": False},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
        }
    },
}

_NAMES = ExpertNames(correction="gate.e_score_correction_bias")


def latent_sizes(config: dict[str, Any]) -> LatentSizes:
    """As config.json names them."""
    return LatentSizes(
        heads=config["num_attention_heads"],
        rank=config["kv_lora_rank"],
        rope=config["qk_rope_head_dim"],
        nope=config["qk_nope_head_dim"],
        value=config["v_head_dim"],
        q_rank=config.get("q_lora_rank") or 0,
        bias=bool(config.get("attention_bias", False)),
    )


def latent_attention(config: dict[str, Any], *, interleaved: bool = True) -> Latents:
    """The mixer that config.json describes."""
    sizes = latent_sizes(config)
    rope = rope_spec(config, sizes.rope, interleaved=interleaved)
    scale, grown = (sizes.nope + sizes.rope) ** -0.5, rope.get("mscale_all_dim", 0.0)
    if grown and rope.get("factor", 1.0) > 1:
        scale *= (0.1 * grown * math.log(rope.get("factor")) + 1.0) ** 2
    return Latents(sizes, rope, scale)


def sparse_layers(
    config: dict[str, Any], experts: Experts, attention: Callable[[int], Latents] | None = None
) -> tuple[LayerKind, ...]:
    """Dense layers first, then sparse ones, perhaps not every one. `attention`: a layer's; None: the usual one."""
    usual_one = latent_attention(config, interleaved=bool(config["rope_interleave"]))
    kinds = config.get("mlp_layer_types")

    def layer(n: int) -> LayerKind:
        sparse = n >= config["first_k_dense_replace"] and n % (config.get("moe_layer_freq") or 1) == 0
        if kinds:
            sparse = kinds[n] == "sparse"
        return LayerKind(usual_one if attention is None else attention(n), experts if sparse else usual_mlp(config))

    return each_layer(config, layer)


def grouped_router(config: dict[str, Any]) -> RouterSpec:
    """Sigmoid scores with a correction, the best groups first; also GLM-4.5's and Nemotron 3's."""
    return RouterSpec(
        config["num_experts_per_tok"],
        "sigmoid",
        renormalise=bool(config["norm_topk_prob"]),
        eps=1e-20,
        scale=float(config["routed_scaling_factor"]),
        groups=config["n_group"],
        keep=config["topk_group"],
    )


def grouped_experts(config: dict[str, Any]) -> Experts:
    """Experts behind that router, and a dense block beside."""
    inner = config["moe_intermediate_size"]
    sparse = ExpertsConfig(config["n_routed_experts"], inner, grouped_router(config), names=_NAMES)
    shared = usual_mlp(config, inner_size=inner * int(config["n_shared_experts"] or 1), name="shared_experts")
    return Experts(sparse, shared=shared)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Trunk(ctx, usual(config, layers=sparse_layers(config, grouped_experts(config))), max_positions)
