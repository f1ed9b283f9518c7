"""Qwen3.5, the language model alone: gated delta nets whose projections lie apart, gated attention, dense blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, usual_mlp
from phloem.models.qwen3_next import DEFAULTS as DEFAULTS
from phloem.models.qwen3_next import hybrid

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

TINY = {
    "num_hidden_layers": 3,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
VARIANTS = {"tied": {"tie_word_embeddings": True, "linear_num_value_heads": 2}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    block = usual_mlp(config)
    return hybrid(config, ctx, max_positions, lambda n: block, grouped=False)
