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
