"""Mistral Small 4 and Large 3: DeepSeek V3 with softmax routing; queries grow with their position.

The norms of latents and the rotation of neighbours are DeepSeek's, the growth is Ministral 3's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
    beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    return replace(made, q_growth=QGrowth(float(beta), int(length))) if beta and length else made


def _experts(config: dict[str, Any]) -> Experts:
    found = grouped_experts(config)
    router = replace(found.config.router, score="softmax")
    # In Mistral's own format (`params.json`) each expert has tensors of its own.
    names = ExpertNames() if config.get("projections_apart") else _NAMES
    return replace(found, config=replace(found.config, router=router, names=names))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    attention = _attention(config)
    layers = sparse_layers(config, _experts(config), lambda n: attention)
    return Trunk(ctx, usual(config, layers=layers), max_positions)
