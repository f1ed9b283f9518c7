"""SmolVLM and Idefics3: SigLIP over tiles of a picture and the whole of it, squares of patches as one token, Llama."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.layers.linear import Linear
from phloem.models._vision import SeeingDecoder
from phloem.models._vit import Names, TileTower, ViT, clip_block, shuffled, text_decoder

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

# A video's frames are pictures of one tile.
VISION = {"processor": "idefics3", "image": "image_token_id", "video": "image_token_id"}
DEFAULTS = {"image_token_id": 128257, "scale_factor": 2}
TINY = {
    "model_type": "llama",
    "max_position_embeddings": 1024,
    "around": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        "image_token_id": 6,
        "scale_factor": 2,
    },
}  # fmt: skip
RENAMES = {
    "model.vision_model.": "vision_model.",
    "model.connector.": "connector.",
    "model.text_model.": "model.",
}


class BucketViT(ViT):
    """Places of patches are shares of the picture's sides, put into as many buckets as the tower has places."""

    def _positions(self, wanted: int) -> Tensor:
        table: Tensor = self.positions.value
        count = round(wanted**0.5)
        borders = torch.arange(1 / self.side, 1.0, 1 / self.side, device=table.device)
        shares = torch.arange(count, dtype=torch.float32, device=table.device) * (1.0 / torch.tensor(count))
        bucket = torch.bucketize(shares.clamp(max=1.0 - 1e-6), borders, right=True)
        return table[(bucket[:, None] * self.side + bucket).flatten()]


class SmolTower(TileTower):
    def __init__(self, ctx: BuildContext, config: dict[str, Any]) -> None:
        super().__init__(ctx, config["image_token_id"], config["hidden_size"])
        vision: dict[str, Any] = {
            "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
            "image_size": 224, "patch_size": 32, **(config.get("vision_config") or {}),
        }  # fmt: skip
        kind, patch = clip_block(vision, "gelu_pytorch_tanh", 1e-6), vision["patch_size"]
        names = Names(after="post_layernorm")
        own, depth = ctx.child("vision_model"), vision["num_hidden_layers"]
        self.vit = BucketViT(own, kind, depth, patch, vision["image_size"] // patch, names)
        self.factor = config["scale_factor"]
        wide = kind.hidden_size * self.factor**2
        self.proj = Linear(ctx.child("connector").child("modality_projection"), wide, {"proj": config["hidden_size"]})

    def joined(self, x_BTN: Tensor) -> Tensor:
        return self.proj(shuffled(x_BTN, self.factor).flatten(0, 1))[0].unflatten(0, (len(x_BTN), -1))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return SeeingDecoder(ctx, text_decoder(config), max_positions, SmolTower(ctx, config), RENAMES)
