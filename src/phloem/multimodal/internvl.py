"""InternVL: a picture in the grid of tiles that is nearest to its shape, and the whole of it as one more tile."""

from __future__ import annotations

from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, as_array, resized, scale_of


class GridPictures:
    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        given = vision.get("image_size", 448), vision.get("patch_size", 14)
        sides = [value[0] if isinstance(value, list) else value for value in given]
        size = settings.get("size") or {"height": sides[0], "width": sides[0]}
        self.tile = int(size.get("height", sides[0]))
        self.least, self.most = int(settings.get("min_patches") or 1), int(settings.get("max_patches") or 12)
        self.cuts = bool(settings.get("crop_to_patches", True)) and self.most > 1
        self.scale = scale_of(settings, CLIP_MEAN, CLIP_STD)
        ratio = float(facts.config.get("downsample_ratio", 0.5))
        self.tokens = round((self.tile // int(sides[1])) ** 2 * ratio**2)
        self.mark = self.placeholder = facts.text_of(facts.config["image_token_id"])
        self.inline = self.mark + "\n"

    def make(self, image: Any, /) -> Picture:
        tile, settings = self.tile, self.settings
        columns, rows = self._grid(*image.size) if self.cuts else (1, 1)
        spread = as_array(resized(image, columns * tile, rows * tile, settings))
        tiles = spread.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        if len(tiles) > 1:
            tiles = np.concatenate([tiles, as_array(resized(image, tile, tile, settings))[None]])
        return Picture(tiles, self.scale, f"<img>{self.mark}</img>", (self.tokens * len(tiles),))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows nearest in shape; of equals more tiles, while the picture has pixels for half of them."""
        sides = range(1, self.most + 1)
        grids = [(columns, rows) for columns in sides for rows in sides if self.least <= columns * rows <= self.most]
        best, least = (1, 1), float("inf")
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            apart = abs(width / height - columns / rows)
            fits = width * height > 0.5 * self.tile**2 * columns * rows
            if apart < least or (apart == least and fits):
                best, least = (columns, rows), apart
        return best


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": GridPictures(facts)}
