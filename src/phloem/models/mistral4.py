"""Mistral Small 4 and Large 3: DeepSeek V3 with softmax routing; queries grow with their position.

The norms of latents and the rotation of neighbours are DeepSeek's, the growth is Ministral 3's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.attention import QGrowth
from phloem.layers.moe import ExpertNames
from phloem.models._common import Decoder, Trunk, usual
from phloem.models._layer import Experts, Latents
from phloem.models.deepseek_v3 import grouped_experts, latent_attention, sparse_layers

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "rope_interleave": True,
}
# Files of Large 3 in Mistral's own format become `deepseek2`, with what tells them from DeepSeek's.
GGUF = {
    "architecture": "mistral4",
    "hf_class": "Mistral4ForCausalLM",
    "also": ("deepseek2 with growing queries",),
    "keys": {
        "q_lora_rank": ("attention.q_lora_rank", 0),
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_rope_head_dim": "rope.dimension_count",
        "head_dim": "rope.dimension_count",
        "n_routed_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "n_shared_experts": ("expert_shared_count", 1),
        "moe_intermediate_size": "expert_feed_forward_length",
        "first_k_dense_replace": ("leading_dense_block_count", 0),
        "routed_scaling_factor": ("expert_weights_scale", 1.0),
        "norm_topk_prob": ("expert_weights_norm", False),
        "n_group": ("expert_group_count", 1),
        "topk_group": ("expert_group_used_count", 1),
        "expert_gating_func": ("expert_gating_func", 1),
        "llama_4_scaling_beta": ("attention.temperature_scale", 0.0),
        "growth_length": ("attention.temperature_length", 0),
    },
    "config": {"rope_interleave": True, "projections_apart": True},
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
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.5,
    },
}
VARIANTS = {
    "groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.0},
    "plain": {"q_lora_rank": None, "first_k_dense_replace": 0},
}

_NAMES = ExpertNames(gate="experts.gate_up_proj", up="experts.gate_up_proj", down="experts.down_proj")


def _attention(config: dict[str, Any]) -> Latents:
    rope = dict(config.get("rope_parameters") or {})
    # Of the whole head, whose rotated part is known: the table is that part's alone.
    rope.pop("partial_rotary_factor", None)
    made = latent_attention({**config, "rope_parameters": rope}, interleaved=bool(config["rope_interleave"]))
    beta = rope.get("llama_4_scaling_beta") or config.get("llama_4_scaling_beta")  # GGUF
    length = config.get("growth_length") or rope.get("original_max_position_embeddings")
    return replace(made, q_growth=QGrowth(float(beta), int(length))) if beta and length else made


def _experts(config: dict[str, Any]) -> Experts:
    found = grouped_experts(config)
    router = replace(found.config.router, score="softmax")
    # In Mistral's own format (`params.json`) each expert has tensors of its own.
    names = ExpertNames() if config.get("projections_apart") else _NAMES
    return replace(found, config=replace(found.config, router=router, names=names))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("expert_gating_func", 1) != 1:
        raise ModelLoadError(f"expert_gating_func {config['expert_gating_func']}: only softmax (1) is known")
    attention = _attention(config)
    layers = sparse_layers(config, _experts(config), lambda n: attention)
    return Trunk(ctx, usual(config, layers=layers), max_positions)
