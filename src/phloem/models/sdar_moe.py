"""SDAR with experts: Qwen3-MoE's layers, which see their own block both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.moe import softmax_experts
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind
from phloem.models.sdar import DEFAULTS, DIFFUSION

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

__all__ = ["DEFAULTS", "DIFFUSION", "TINY", "build"]

TINY = {
    "mask_token_id": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    experts = softmax_experts(
        count=config["num_experts"],
        per_token=config["num_experts_per_tok"],
        inner_size=config["moe_intermediate_size"],
        activation=config.get("hidden_act", "silu"),
        renormalise=bool(config.get("norm_topk_prob", True)),
    )
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or []
    attention = usual_attention(config, block=config["block_size"], qk_norm="head")

    def layer(n: int) -> LayerKind:
        sparse = (n + 1) % step == 0 and n not in dense
        return LayerKind(attention, Experts(experts) if sparse else usual_mlp(config))

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
