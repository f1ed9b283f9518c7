"""Qwen2.5-VL: Qwen2-VL with a tower that attends in windows in most of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._qwen_vision import QwenTower, QwenVision
from phloem.models._vision import BlockKind
from phloem.models.qwen2_vl import DEFAULTS as DEFAULTS
from phloem.models.qwen2_vl import VISION as VISION
from phloem.models.qwen2_vl import qwen2_decoder

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

TINY = {
    "head_dim": None,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    "around": {
        "vision_config": {
            "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        "image_token_id": 6,
        "video_token_id": 7,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
    },
}  # fmt: skip


def vision_sizes(config: dict[str, Any], qkv: tuple[str, ...] = ("qkv",)) -> QwenVision:
    """Of the tower."""
    vision = config.get("vision_config") or {}
    size, inner = vision.get("hidden_size", 1280), vision.get("intermediate_size", 3420)
    act = vision.get("hidden_act", "silu")
    return QwenVision(
        BlockKind(size, vision.get("num_heads", 16), inner, 1e-6, act, rms=True, gated=True, qkv=qkv),
        depth=vision.get("depth", 32),
        patch=vision.get("patch_size", 14),
        merge=vision.get("spatial_merge_size", 2),
        frames=vision.get("temporal_patch_size", 2),
        out_size=config["hidden_size"],
        window=vision.get("window_size", 112),
        full=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
    )


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return qwen2_decoder(config, ctx, max_positions, QwenTower(ctx, config["image_token_id"], vision_sizes(config)))
