"""Mistral Small 3.1: Pixtral's tower with squares of patches as one token, and Mistral."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._pixtral import PixtralTower
from phloem.models._vision import SeeingDecoder
from phloem.models._vit import RENAMES, text_decoder

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

VISION = {"processor": "pixtral", "image": "image_token_id"}
SPELLING = {"image_token_id": "image_token_index"}
DEFAULTS = {"image_token_id": 10, "spatial_merge_size": 2}
TINY = {
    "model_type": "mistral",
    "around": {
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 40, "patch_size": 4, "head_dim": 16,
        },
        "image_token_index": 6,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    tower = PixtralTower(ctx, config, config.get("vision_config") or {}, config["spatial_merge_size"])
    return SeeingDecoder(ctx, text_decoder(config), max_positions, tower, RENAMES)
