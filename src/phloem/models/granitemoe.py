"""Granite MoE: Granite with a sparse block in every layer; the softmax is over the chosen experts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._layer import Experts
from phloem.models.granite import alike, multiplied

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

GGUF_FAMILY = "granitemoeshared"
TINY = {
    "head_dim": None,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.25,
}
VARIANTS = {"tied": {"tie_word_embeddings": True, "num_experts_per_tok": 4}}

_NAMES = ExpertNames(
    router="router.layer", gate="input_linear.weight", up="input_linear.weight", down="output_linear.weight"
)
_APART = ExpertNames(router="router.layer")  # in GGUF files


def chosen(config: dict[str, Any]) -> Experts:
    """The sparse block."""
    names = _APART if config.get("projections_apart") else _NAMES
    router = RouterSpec(config["num_experts_per_tok"], "chosen_softmax")
    sparse = ExpertsConfig(config["num_local_experts"], config["intermediate_size"], router, names=names)
    return Experts(sparse, "block_sparse_moe")


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return multiplied(config, ctx, max_positions, alike(config, chosen(config)))
