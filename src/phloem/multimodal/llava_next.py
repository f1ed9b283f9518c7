"""LLaVA-NeXT: the whole of a picture made square, then its tiles at the best of the sizes that the model knows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, as_array, resized, scale_of

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class TilesAndWhole:
    """`most`: tiles whose patches are all kept; of more they become fewer. 0: all are kept.

    `Picture.extra` says what a tower does with the patches of the tiles, which lie together: rows and columns of tiles;
    the first row and column of patches that are of the picture and no border; how many rows and columns; to how many
    they are made fewer.
    """

    def __init__(self, facts: Facts, most: int = 0) -> None:
        settings = self.settings = facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        self.tile, self.most = int(vision.get("image_size", 336)), most
        self.side = self.tile // int(vision.get("patch_size", 14))
        given: Any = settings.get("image_grid_pinpoints") or facts.config.get("image_grid_pinpoints") or GRIDS
        self.sizes = [(int(height), int(width)) for height, width in given]
        if not self.sizes or any(side < self.tile or side % self.tile for size in self.sizes for side in size):
            raise ValueError(f"image_grid_pinpoints: sizes of whole tiles of {self.tile} pixels are read")
        self.scale = scale_of(settings, CLIP_MEAN, CLIP_STD)
        self.mark = self.inline = self.placeholder = facts.text_of(facts.config["image_token_id"])

    def make(self, image: Any, /) -> Picture:
        from PIL import Image

        tile, (width, height) = self.tile, image.size
        high, wide = self._best(height, width)
        # As much of the canvas as the picture's shape allows, in its middle.
        if wide / width < high / height:
            size = wide, min(math.ceil(height * (wide / width)), high)
        else:
            size = min(math.ceil(width * (high / height)), wide), high
        canvas = Image.new("RGB", (wide, high))
        canvas.paste(resized(image, *size, self.settings), ((wide - size[0]) // 2, (high - size[1]) // 2))
        rows, columns = high // tile, wide // tile
        tiles = as_array(canvas).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        whole = as_array(resized(image, tile, tile, self.settings))[None]
        top, left, kept_rows, kept_columns = self._kept(height, width, rows, columns)
        fewer = self._fewer(kept_rows, kept_columns)
        count = self.side**2 + fewer[0] * (fewer[1] + 1)
        extra = (rows, columns, top, left, kept_rows, kept_columns, *fewer)
        return Picture(np.concatenate([whole, tiles]), self.scale, self.mark, (count,), extra)

    def _best(self, height: int, width: int) -> tuple[int, int]:
        """The size that keeps most of the picture's pixels; of equals the one that wastes least."""

        def worth(size: tuple[int, int]) -> tuple[int, int]:
            scale = min(size[1] / width, size[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - size[0] * size[1]

        return max(self.sizes, key=worth)

    def _kept(self, height: int, width: int, rows: int, columns: int) -> tuple[int, int, int, int]:
        """First row and column of the patches that are no border, and how many."""
        high, wide = rows * self.side, columns * self.side
        if width / height > wide / high:
            border = (high - int(round(height * (wide / width), 7))) // 2
            return border, 0, high - 2 * border, wide
        border = (wide - int(round(width * (high / height), 7))) // 2
        return 0, border, high, wide - 2 * border

    def _fewer(self, rows: int, columns: int) -> tuple[int, int]:
        ratio = math.sqrt(rows * columns / (self.most * self.side**2)) if self.most else 0.0
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": TilesAndWhole(facts)}
