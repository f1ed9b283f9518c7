"""LLaVA 1.5: CLIP or SigLIP, two matrices, and a language model; and Pixtral in the same clothes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.models._pixtral import PixtralTower
from phloem.models._vision import SeeingDecoder
from phloem.models._vit import RENAMES, Names, Projector, TileTower, ViT, clip_block, text_decoder

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

VISION = {"processor": "llava", "image": "image_token_id"}
SPELLING = {"image_token_id": "image_token_index"}
# Of Llama, whose sizes published files leave out where they are these.
DEFAULTS = {
    "image_token_id": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
TINY = {
    "model_type": "llama",
    "around": {
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        },
        "image_token_index": 6,
    },
}  # fmt: skip
VARIANTS = {
    "siglip": {
        "around": {
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
                "vision_use_head": False,
            },
            "image_token_index": 6,
            "vision_feature_select_strategy": "full",
        },
    },
    "pixtral": {
        "around": {
            "vision_config": {
                "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 40, "patch_size": 4, "head_dim": 16,
            },
            "image_token_index": 6,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    },
}  # fmt: skip


class LlavaTower(TileTower):
    def __init__(self, ctx: BuildContext, config: dict[str, Any], vision: dict[str, Any]) -> None:
        super().__init__(ctx, config["image_token_id"], config["hidden_size"])
        clip = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
        kind = clip_block(vision) if clip else clip_block(vision, "gelu_pytorch_tanh", 1e-6)
        layer = config.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise ModelLoadError(f"vision_feature_layer {layer!r}: one layer is served, not several")
        depth = layer if layer >= 0 else vision["num_hidden_layers"] + 1 + layer
        names = Names(classes="embeddings.class_embedding", before="pre_layrnorm") if clip else Names()
        side = vision["image_size"] // vision["patch_size"]
        self.vit = ViT(ctx.child("vision_tower"), kind, depth, vision["patch_size"], side, names, bias=not clip)
        self.first = int(config.get("vision_feature_select_strategy", "default") == "default")
        bias = bool(config.get("multimodal_projector_bias", True))
        self.projector = Projector(
            ctx.child("multi_modal_projector"), kind.hidden_size, config["hidden_size"], bias=bias
        )

    def joined(self, x_BTN: Tensor) -> Tensor:
        kept = x_BTN[:, self.first :]
        return self.projector(kept.flatten(0, 1)).unflatten(0, (len(kept), -1))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    vision = config.get("vision_config") or {}
    kind = vision.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "siglip_vision_model", "pixtral"):
        raise ModelLoadError(f"vision_config.model_type {kind!r} is not served in LLaVA")
    tower = PixtralTower(ctx, config, vision) if kind == "pixtral" else LlavaTower(ctx, config, vision)
    return SeeingDecoder(ctx, text_decoder(config), max_positions, tower, RENAMES)
