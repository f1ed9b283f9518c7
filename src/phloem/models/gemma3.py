"""Gemma 3 multimodal checkpoints, of which the language model is served; the image tower is left in the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder
from phloem.models.gemma3_text import DEFAULTS as DEFAULTS
from phloem.models.gemma3_text import decoder_config

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

TINY = {
    "num_hidden_layers": 7,
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "around": {  # the text model
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Decoder(ctx, decoder_config(config), max_positions)
