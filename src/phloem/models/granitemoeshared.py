"""Granite MoE with a dense block beside the experts of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._layer import MLP
from phloem.models.granite import alike, multiplied
from phloem.models.granitemoe import chosen
from phloem.models.granitemoehybrid import Beside

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

DEFAULTS = {"shared_intermediate_size": 0}
TINY = {
    "head_dim": None,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "shared_intermediate_size": 40,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.25,
}
VARIANTS = {"alone": {"shared_intermediate_size": 0, "tie_word_embeddings": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    sparse, inner, activation = chosen(config), config["shared_intermediate_size"], config.get("hidden_act", "silu")
    dense = MLP(inner, activation, fused="input_linear", name="shared_mlp", down="output_linear")
    return multiplied(config, ctx, max_positions, alike(config, Beside(sparse, dense) if inner else sparse))
