"""Qwen2-VL: Qwen2 whose tokens have places in time, height and width, and a tower for pictures of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_layer
from phloem.models._qwen_vision import RENAMES, QwenTower, QwenVision
from phloem.models._vision import BlockKind, SeeingDecoder
from phloem.models.qwen2 import windows

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

VISION = {"processor": "qwen_vl", "image": "image_token_id", "video": "video_token_id"}
DEFAULTS = {"image_token_id": 151655, "video_token_id": 151656}
TINY = {
    "head_dim": None,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    "around": {
        "vision_config": {
            "depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32, "patch_size": 4
        },
        "image_token_id": 6,
        "video_token_id": 7,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
    },
}  # fmt: skip


def qwen2_decoder(config: dict[str, Any], ctx: BuildContext, max_positions: int, tower: QwenTower) -> Decoder:
    """Qwen2's layers, with a tower."""
    sizes = windows(config)
    layers = each_layer(config, lambda n: usual_layer(config, window=sizes[n], qkv_bias=True, out_bias=False))
    return SeeingDecoder(ctx, usual(config, layers=layers), max_positions, tower, RENAMES)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    vision = config.get("vision_config") or {}
    size = vision.get("embed_dim", 1280)
    inner, act = int(size * vision.get("mlp_ratio", 4)), vision.get("hidden_act", "quick_gelu")
    sizes = QwenVision(
        BlockKind(size, vision.get("num_heads", 16), inner, 1e-6, act),
        depth=vision.get("depth", 32),
        patch=vision.get("patch_size", 14),
        merge=vision.get("spatial_merge_size", 2),
        frames=vision.get("temporal_patch_size", 2),
        out_size=config["hidden_size"],
    )
    return qwen2_decoder(config, ctx, max_positions, QwenTower(ctx, config["image_token_id"], sizes))
