"""SmolVLM and Idefics3: a picture in tiles, row by row, and the whole of it as one more tile."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._pixels import HALF, as_array, resized, scale_of

LANCZOS = 1
MOST_SIDE = 4096


class TiledPictures:
    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        self.longest = int((settings.get("size") or {}).get("longest_edge", 4 * 364))
        self.tile = int((settings.get("max_image_size") or {}).get("longest_edge", 364))
        self.splits = bool(settings.get("do_image_splitting", True))
        self.resizes = bool(settings.get("do_resize", True))
        self.scale = scale_of(settings, HALF, HALF)
        side = self.tile // int(vision.get("patch_size", 32))
        self.tokens = side * side // int(facts.config.get("scale_factor", 2)) ** 2
        self.mark = self.inline = self.placeholder = facts.text_of(facts.config["image_token_id"])

    def make(self, image: Any, /) -> Picture:
        tile = self.tile
        if self.resizes:
            image = resized(image, *self._longest(*image.size), self.settings, LANCZOS)
        if not self.splits:
            return self._whole(resized(image, tile, tile, self.settings, LANCZOS))
        image = resized(image, *self._tiled(*image.size), self.settings, LANCZOS)
        columns, rows = (side // tile for side in image.size)
        if columns * rows == 1:
            return self._whole(image)
        pixels = as_array(image).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        whole = as_array(resized(image, tile, tile, self.settings, LANCZOS))[None]
        around, placeholder = "<fake_token_around_image>", self.placeholder
        lines = [
            "".join(f"{around}<row_{row + 1}_col_{column + 1}>{placeholder}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        text = "".join(lines) + f"\n{around}<global-img>{placeholder}{around}"
        return Picture(np.concatenate([pixels, whole]), self.scale, text, (self.tokens,) * (columns * rows + 1))

    def _whole(self, image: Any) -> Picture:
        around = "<fake_token_around_image>"
        text = f"{around}<global-img>{self.placeholder}{around}"
        return Picture(as_array(image)[None], self.scale, text, (self.tokens,))

    def _longest(self, width: int, height: int) -> tuple[int, int]:
        """With the longest side as long as asked for, and the other one even."""
        ratio = width / height
        if width >= height:
            width, height = self.longest, int(self.longest / ratio)
            height += height % 2
        else:
            width, height = int(self.longest * ratio), self.longest
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        ratio = width / height
        if width >= height and width > MOST_SIDE:
            width, height = MOST_SIDE, int(MOST_SIDE / ratio)
        elif height > MOST_SIDE:
            width, height = int(MOST_SIDE * ratio), MOST_SIDE
        return max(width, 1), max(height, 1)

    def _tiled(self, width: int, height: int) -> tuple[int, int]:
        """The next size of whole tiles."""

        def whole(side: float) -> int:
            return math.ceil(side / self.tile) * self.tile

        ratio = width / height
        if width >= height:
            width = whole(width)
            return width, whole(int(width / ratio))
        height = whole(height)
        return whole(int(height * ratio)), height


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": TiledPictures(facts)}
