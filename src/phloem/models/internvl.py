"""InternVL 2.5 and 3: tiles of a picture and the whole of it, squares of patches as one token, Qwen or Llama."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.norm import LayerNorm
from phloem.models._vision import BlockKind, SeeingDecoder
from phloem.models._vit import RENAMES, Names, Projector, TileTower, ViT, shuffled, text_decoder

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

# A video's frames are pictures of one tile.
VISION = {"processor": "internvl", "image": "image_token_id", "video": "image_token_id"}
DEFAULTS = {"image_token_id": 151667, "downsample_ratio": 0.5}
TINY = {
    "model_type": "qwen2",
    "head_dim": None,
    "around": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [16, 16], "patch_size": [4, 4],
        },
        "image_token_id": 6,
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


class InternTower(TileTower):
    def __init__(self, ctx: BuildContext, config: dict[str, Any]) -> None:
        super().__init__(ctx, config["image_token_id"], config["hidden_size"])
        vision: dict[str, Any] = {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 448, "patch_size": 14, **(config.get("vision_config") or {}),
        }  # fmt: skip
        sides = vision["image_size"], vision["patch_size"]
        size, patch = (value[0] if isinstance(value, list) else value for value in sides)
        rms = vision.get("norm_type", "layer_norm") == "rms_norm"
        if not vision.get("use_absolute_position_embeddings", True) or config.get("vision_feature_layer", -1) != -1:
            raise ModelLoadError("InternVL is served with learned positions and its last layer alone")
        kind = BlockKind(
            vision["hidden_size"], vision["num_attention_heads"], vision["intermediate_size"],
            float(vision.get("layer_norm_eps", 1e-6)), vision.get("hidden_act", "gelu"), rms=rms,
            norms=("layernorm_before", "layernorm_after"), attention="attention", qkv=("q_proj", "k_proj", "v_proj"),
            qkv_bias=bool(vision.get("attention_bias", False)), out="projection_layer", scales=("lambda_1", "lambda_2"),
            qk_norms=("q_norm", "k_norm") if vision.get("use_qk_norm") else (),
        )  # fmt: skip
        names = Names(
            "embeddings.patch_embeddings.projection", "embeddings.position_embeddings", "embeddings.cls_token",
            after="" if vision.get("use_mean_pooling", True) else "layernorm", layers="encoder.layer",
        )  # fmt: skip
        self.vit = ViT(ctx.child("vision_tower"), kind, vision["num_hidden_layers"], patch, size // patch, names)
        self.factor = round(1 / config["downsample_ratio"])
        join, wide = ctx.child("multi_modal_projector"), kind.hidden_size * self.factor**2
        self.norm = LayerNorm(join.child("layer_norm"), wide, 1e-5)
        self.projector = Projector(join, wide, config["hidden_size"])

    def joined(self, x_BTN: Tensor) -> Tensor:
        merged = shuffled(x_BTN[:, 1:].contiguous(), self.factor)
        return self.projector(self.norm(merged.flatten(0, 1))).unflatten(0, (len(merged), -1))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return SeeingDecoder(ctx, text_decoder(config), max_positions, InternTower(ctx, config), RENAMES)
