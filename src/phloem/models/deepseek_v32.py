"""DeepSeek V3.2: DeepSeek V3 whose layers attend to the tokens that an indexer chooses; its heads turn by halves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.latent import IndexSizes
from phloem.models._common import Decoder, Trunk, usual
from phloem.models.deepseek_v3 import grouped_experts, latent_attention, sparse_layers

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._layer import Latents

DEFAULTS = {
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
GGUF = {
    "architecture": "deepseek32",
    "hf_class": "DeepseekV32ForCausalLM",
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
# With few heads of an indexer many scores are 0, and any choice among equals is as good.
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
    "index_n_heads": 32,
    "index_head_dim": 20,
    "index_topk": 6,
}
VARIANTS = {"all": {"index_topk": 64}}


def indexed(config: dict[str, Any], *, interleaved: bool) -> Latents:
    """A layer with an indexer. `interleaved`: how its heads turn."""
    if not config.get("q_lora_rank"):
        raise ModelLoadError("q_lora_rank: an indexer reads the latents of queries, and there are none")
    attention = latent_attention(config, interleaved=bool(config["rope_interleave"]))
    sizes = IndexSizes(config["index_n_heads"], config["index_head_dim"], config["index_topk"])
    turned = None if attention.rope is None else replace(attention.rope, interleaved=interleaved)
    return replace(attention, index=sizes, index_rope=turned)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    attention = indexed(config, interleaved=False)
    layers = sparse_layers(config, grouped_experts(config), lambda n: attention)
    return Trunk(ctx, usual(config, layers=layers), max_positions)
