"""Qwen3-VL with experts, whose matrices are stacked and stored as [experts, in_features, out_features]."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.layers.moe import ExpertNames, softmax_experts
from phloem.models._common import each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind
from phloem.models._qwen_vision import RENAMES
from phloem.models._vision import SeeingDecoder
from phloem.models.qwen3_vl import DEFAULTS as DEFAULTS
from phloem.models.qwen3_vl import VISION as VISION
from phloem.models.qwen3_vl import deep_tower

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

TINY = {
    "num_hidden_layers": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0
    },
    "around": {
        "vision_config": {
            "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
            "patch_size": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1],
        },
        "image_token_id": 6,
        "video_token_id": 7,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
    },
}  # fmt: skip
_NAMES = ExpertNames(gate="experts.gate_up_proj", up="experts.gate_up_proj", down="experts.down_proj", transposed=True)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    experts = softmax_experts(
        count=config["num_experts"],
        per_token=config["num_experts_per_tok"],
        inner_size=config["moe_intermediate_size"],
        activation=config.get("hidden_act", "silu"),
        renormalise=True,
    )
    sparse = Experts(replace(experts, names=_NAMES))
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or []

    def layer(n: int) -> LayerKind:
        chosen = (n + 1) % step == 0 and n not in dense
        return LayerKind(usual_attention(config, qk_norm="head"), sparse if chosen else usual_mlp(config))

    layers = each_layer(config, layer)
    return SeeingDecoder(ctx, usual(config, layers=layers), max_positions, deep_tower(config, ctx), RENAMES)
