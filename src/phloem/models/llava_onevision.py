"""LLaVA-OneVision: LLaVA-NeXT with SigLIP and Qwen2, for videos too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import interpolate

from phloem.models.llava_next import TiledTower, tiled_decoder, vision_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

VISION = {"processor": "llava_onevision", "image": "image_token_id", "video": "video_token_id"}
SPELLING = {"image_token_id": "image_token_index", "video_token_id": "video_token_index"}
DEFAULTS = {
    "image_token_id": 151646, "video_token_id": 151647, "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
}  # fmt: skip
# Frames of 5 x 5 patches, half of which is no whole number, with pixels beyond the last; tiles beyond the most.
TINY = {
    "model_type": "qwen2",
    "head_dim": None,
    "around": {
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 22, "patch_size": 4, "vision_use_head": False,
        },
        "image_token_index": 6,
        "video_token_index": 7,
        "vision_aspect_ratio": "anyres_max_2",
        "image_grid_pinpoints": [[22, 22], [22, 44], [44, 22], [44, 44]],
    },
}  # fmt: skip


class OneVisionTower(TiledTower):
    def __init__(self, ctx: BuildContext, config: dict[str, Any], vision: dict[str, Any]) -> None:
        super().__init__(ctx, config, vision)
        self.video_token = int(config["video_token_id"])

    def told(self, item: Media, x_BTM: Tensor) -> Tensor:
        if item.token != self.video_token:
            return super().told(item, x_BTM)
        side, half = self.side, -(-self.side // 2)
        x = x_BTM.transpose(1, 2).unflatten(2, (side, side))
        small = interpolate(x, [half, half], mode="bilinear").flatten(2).transpose(1, 2)
        return torch.cat([small.flatten(0, 1), self.newline.value.to(x.dtype)[None]])


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return tiled_decoder(config, ctx, max_positions, OneVisionTower(ctx, config, vision_of(config)))
