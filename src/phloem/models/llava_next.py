"""LLaVA-NeXT (1.6): LLaVA that sees a picture as a whole and in tiles, with a vector behind each row of patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import interpolate

from phloem.core.errors import ModelLoadError
from phloem.models._vision import SeeingDecoder, vector
from phloem.models._vit import RENAMES, text_decoder
from phloem.models.llava import LlavaTower

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack
    from phloem.models._common import Decoder

VISION = {"processor": "llava_next", "image": "image_token_id"}
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
            "num_attention_heads": 2, "image_size": 12, "patch_size": 4,
        },
        "image_token_index": 6,
        "image_grid_pinpoints": [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]],
    },
}  # fmt: skip


class TiledTower(LlavaTower):
    """What `TilesAndWhole` of the processors made."""

    def __init__(self, ctx: BuildContext, config: dict[str, Any], vision: dict[str, Any]) -> None:
        super().__init__(ctx, config, vision)
        if bool(self.first) != (vision.get("model_type") == "clip_vision_model"):
            raise ModelLoadError("vision_feature_select_strategy: the patches of a picture alone are served")
        self.side = vision["image_size"] // vision["patch_size"]
        self.newline = vector(ctx, "image_newline", config["hidden_size"])

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        pixels = torch.cat([self.pixels(item) for item in items])
        made = self.joined(self.vit(pixels, self.like, pack)).split([item.shape[0] for item in items])
        return [self.told(item, part) for item, part in zip(items, made, strict=True)]

    def told(self, item: Media, x_BTM: Tensor) -> Tensor:
        """A picture's embeddings: of the whole, then of the tiles row by row of patches."""
        rows, columns, top, left, high, wide, fewer_high, fewer_wide = item.extra
        side = self.side
        x = x_BTM[1:].view(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
        x_HWM = x[top : top + high, left : left + wide]
        if (fewer_high, fewer_wide) != (high, wide):
            smaller = interpolate(x_HWM.permute(2, 0, 1)[None], [fewer_high, fewer_wide], mode="bilinear")
            x_HWM = smaller[0].permute(1, 2, 0)
        ends = self.newline.value.to(x.dtype).expand(len(x_HWM), 1, -1)
        return torch.cat([x_BTM[0], torch.cat([x_HWM, ends], 1).flatten(0, 1)])


def tiled_decoder(config: dict[str, Any], ctx: BuildContext, max_positions: int, tower: TiledTower) -> Decoder:
    renames = {"model.image_newline": "image_newline", **RENAMES}
    return SeeingDecoder(ctx, text_decoder(config), max_positions, tower, renames)


def vision_of(config: dict[str, Any]) -> dict[str, Any]:
    """Raises ModelLoadError."""
    vision: dict[str, Any] = config.get("vision_config") or {}
    kind = vision.get("model_type")
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise ModelLoadError(f"vision_config.model_type {kind!r} is not served in LLaVA-NeXT and OneVision")
    return vision


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return tiled_decoder(config, ctx, max_positions, TiledTower(ctx, config, vision_of(config)))
