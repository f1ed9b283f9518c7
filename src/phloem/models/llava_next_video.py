"""LLaVA-NeXT-Video: LLaVA-NeXT for videos too, the patches of whose frames are pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.functional import avg_pool2d, max_pool2d

from phloem.core.errors import ModelLoadError
from phloem.models.llava_next import TiledTower, tiled_decoder, vision_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack
    from phloem.models._common import Decoder

VISION = {"processor": "llava_next_video", "image": "image_token_id", "video": "video_token_id"}
SPELLING = {"image_token_id": "image_token_index", "video_token_id": "video_token_index"}
DEFAULTS = {
    "image_token_id": 32001, "video_token_id": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "spatial_pool_mode": "average", "spatial_pool_stride": 2,
}  # fmt: skip
TINY = {
    "model_type": "llama",
    "around": {
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
        "image_token_index": 6,
        "video_token_index": 7,
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
    },
}  # fmt: skip
_POOLS = {"average": avg_pool2d, "max": max_pool2d}


class PooledTower(TiledTower):
    """Frames are pooled before they are joined to the model, pictures are not at all."""

    def __init__(self, ctx: BuildContext, config: dict[str, Any], vision: dict[str, Any]) -> None:
        super().__init__(ctx, config, vision)
        mode, self.stride = config["spatial_pool_mode"], int(config["spatial_pool_stride"])
        if mode not in _POOLS:
            raise ModelLoadError(f"spatial_pool_mode {mode!r} is not served; known: {', '.join(_POOLS)}")
        self.pool, self.video_token = _POOLS[mode], int(config["video_token_id"])

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        pictures = [item for item in items if item.token != self.video_token]
        seen = iter(super().encode(pictures, pack) if pictures else [])
        return [self._film(item, pack) if item.token == self.video_token else next(seen) for item in items]

    def _film(self, item: Media, pack: Pack) -> Tensor:
        x_BTN = self.vit(self.pixels(item), self.like, pack)[:, self.first :]
        x_BNHW = x_BTN.transpose(1, 2).unflatten(2, (self.side, self.side))
        small = self.pool(x_BNHW, self.stride, self.stride).flatten(2).transpose(1, 2)
        return self.projector(small.flatten(0, 1))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return tiled_decoder(config, ctx, max_positions, PooledTower(ctx, config, vision_of(config)))
