"""GLM-4.5V: GLM-4.5's experts behind GLM-4.1V's tower, with places in time, height and width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import each_layer, layer_number, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind
from phloem.models._qwen_vision import RENAMES
from phloem.models._vision import SeeingDecoder
from phloem.models.deepseek_v3 import grouped_experts
from phloem.models.glm4v import VISION as VISION
from phloem.models.glm4v import glm_tower

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

DEFAULTS = {
    "image_token_id": 151363, "image_start_token_id": 151339, "image_end_token_id": 151340, "video_token_id": 151364,
    "video_start_token_id": 151341, "video_end_token_id": 151342,
    "partial_rotary_factor": 0.5, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "routed_scaling_factor": 1.0, "attention_bias": True,
}  # fmt: skip
TINY = {
    "hidden_size": 64,
    "head_dim": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "attention_bias": True,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "partial_rotary_factor": 0.5
    },
    "around": {
        "vision_config": {
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
            "patch_size": 4, "image_size": 24,
        },
        "image_token_id": 6,
        "image_start_token_id": 4,
        "image_end_token_id": 5,
        "video_token_id": 7,
        "video_start_token_id": 4,
        "video_end_token_id": 5,
    },
}  # fmt: skip


class SeeingTrunk(SeeingDecoder):
    """Its files may hold layers behind its last one, which draft."""

    def checkpoint_name(self, name: str) -> str | None:
        found = super().checkpoint_name(name)
        return None if found is None or layer_number(found) >= len(self.layers) else found


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    experts, attention = grouped_experts(config), usual_attention(config, out_bias=False)

    def layer(n: int) -> LayerKind:
        dense = n < config["first_k_dense_replace"]
        return LayerKind(attention, usual_mlp(config) if dense else experts)

    layers = each_layer(config, layer)
    return SeeingTrunk(ctx, usual(config, layers=layers), max_positions, glm_tower(config, ctx), RENAMES)
