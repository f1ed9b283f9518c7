"""Gemma 3 with pictures: SigLIP, squares of patches averaged, and tokens of a picture that see each other both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.norm import RMSNorm
from phloem.models._common import Decoder
from phloem.models._vision import SeeingDecoder, vector
from phloem.models._vit import RENAMES, Names, TileTower, ViT, clip_block, shuffled
from phloem.models.gemma3_text import DEFAULTS as DEFAULTS
from phloem.models.gemma3_text import decoder_config

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext

VISION = {"processor": "gemma3", "image": "image_token_id"}
SPELLING = {"image_token_id": "image_token_index", "boi_token_id": "boi_token_index", "eoi_token_id": "eoi_token_index"}
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
            "image_size": 16,
            "patch_size": 4,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 6,
        "boi_token_index": 4,
        "eoi_token_index": 5,
    },
}


class GemmaTower(TileTower):
    whole = True

    def __init__(self, ctx: BuildContext, config: dict[str, Any]) -> None:
        super().__init__(ctx, config["image_token_id"], config["hidden_size"])
        vision: dict[str, Any] = {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "image_size": 896, "patch_size": 14, **config["vision_config"],
        }  # fmt: skip
        kind, patch = clip_block(vision, "gelu_pytorch_tanh", 1e-6), vision["patch_size"]
        side, depth = vision["image_size"] // patch, vision["num_hidden_layers"]
        self.vit = ViT(ctx.child("vision_tower"), kind, depth, patch, side, Names(after="post_layernorm"))
        self.factor = side // round(config.get("mm_tokens_per_image", 256) ** 0.5)
        join = ctx.child("multi_modal_projector")
        self.norm = RMSNorm(join.child("mm_soft_emb_norm"), kind.hidden_size, kind.eps, 1.0)
        self.matrix = vector(join, "mm_input_projection_weight", kind.hidden_size, config["hidden_size"])

    def joined(self, x_BTN: Tensor) -> Tensor:
        squares = shuffled(x_BTN, self.factor).unflatten(-1, (self.factor**2, -1))
        return self.norm(squares.mean(2)) @ self.matrix.value.to(x_BTN.dtype)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if "vision_config" not in config:
        return Decoder(ctx, decoder_config(config), max_positions)
    if config.get("use_bidirectional_attention"):
        raise ModelLoadError("use_bidirectional_attention: an encoder that sees pictures is not served")
    return SeeingDecoder(ctx, decoder_config(config), max_positions, GemmaTower(ctx, config), RENAMES)
