"""GLM-4.7-Flash: the latent attention and the sparse blocks of DeepSeek V3 in a smaller model of GLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, Trunk, usual
from phloem.models.deepseek_v3 import grouped_experts, sparse_layers

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "rope_interleave": True,
}
GGUF_FAMILY = "deepseek_v3"
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
}
VARIANTS = {"plain": {"q_lora_rank": None, "mlp_layer_types": ["sparse", "dense", "sparse"]}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Trunk(ctx, usual(config, layers=sparse_layers(config, grouped_experts(config))), max_positions)
