"""GLM-5: DeepSeek V3.2 whose indexers turn by neighbours; some layers take over the choice of one before them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.models._common import Decoder, Trunk, usual
from phloem.models.deepseek_v3 import grouped_experts, sparse_layers
from phloem.models.deepseek_v32 import indexed

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "rms_norm_eps": 1e-5,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 1,
    "index_skip_topk_offset": 2,
}
GGUF = {
    "architecture": "glm-dsa",
    "hf_class": "GlmMoeDsaForCausalLM",
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
        "index_n_heads": "attention.indexer.head_count",
        "index_head_dim": "attention.indexer.key_length",
        "index_topk": "attention.indexer.top_k",
    },
    "config": {"rope_interleave": True},
    # Layers that take over a choice have no indexer.
    "kinds": {"indexer_types": {"indexer.proj.weight": "full", "attn_kv_a_mqa.weight": "shared"}},
    "unheeded": ("attention.indexer.types",),
    "names": {
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.kv_b_proj": "attn_kv_b",
        "self_attn.indexer.wq_b": "indexer.attn_q_b",
        "self_attn.indexer.wk": "indexer.attn_k",
        "self_attn.indexer.k_norm": "indexer.k_norm",
        "self_attn.indexer.weights_proj": "indexer.proj",
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
        "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    },
}
TINY = {
    "head_dim": None,
    "num_hidden_layers": 4,
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
    "index_n_heads": 32,
    "index_head_dim": 20,
    "index_topk": 6,
    "indexer_types": ["full", "shared", "full", "shared"],
}
VARIANTS = {"each": {"indexer_types": ["full", "full", "full", "full"]}}


def borrowing(config: dict[str, Any]) -> list[bool]:
    """Which layers take over a choice: from the list of today's files, or the pattern or the period of older ones.

    Raises:
        ModelLoadError: for kinds that are not known.
    """
    count, listed = config["num_hidden_layers"], config.get("indexer_types") or config.get("index_topk_pattern")
    if not listed:
        every, first = max(int(config["index_topk_freq"]), 1), int(config["index_skip_topk_offset"])
        return [max(number - first + 1, 0) % every != 0 for number in range(count)]
    known = {"F": False, "full": False, "S": True, "shared": True}
    unknown = sorted(set(listed) - set(known))
    if unknown or len(listed) != count:
        raise ModelLoadError(f"indexer_types: {len(listed)} entries for {count} layers, unknown: {unknown}")
    return [known[kind] for kind in listed]


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    own, borrows = indexed(config, interleaved=True), borrowing(config)
    taken_over = replace(own, index=None, borrows=True)
    layers = sparse_layers(config, grouped_experts(config), lambda n: taken_over if borrows[n] else own)
    return Trunk(ctx, usual(config, layers=layers), max_positions)
