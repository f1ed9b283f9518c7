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
