"""InternVL: a picture in the grid of tiles that is nearest to its shape, and the whole of it as one more tile;
videos of tiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._aside import Film
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, MOST_PIXELS, as_array, resized, scale_of
from phloem.multimodal._video import MOST_FRAMES

USUAL_FRAMES = 8


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


class TileVideos(GridPictures):
    """Each frame as a tile, with its number in front."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.shown = {**self.settings, **facts.video}
        self.scale = scale_of(self.shown, CLIP_MEAN, CLIP_STD)
        self.picture, self.mark = self.placeholder, "<video>"
        self.inline = self.mark + "\n"

    def make(self, source: Film, /) -> Picture:
        number, fps = source.wanted.num_frames, source.wanted.fps
        if number is None and fps is None:
            number, fps = self.shown.get("num_frames"), self.shown.get("fps")
        count = int(number or USUAL_FRAMES) if fps is None else int(source.total / source.fps * float(fps))
        count = max(1, min(count, source.total, MOST_FRAMES))
        if count * self.tile**2 > MOST_PIXELS:
            raise ValueError(f"{count} frames have more than {MOST_PIXELS} pixels in all: ask for fewer")
        # From the middle of as many parts.
        indices = ((np.arange(count) + 0.5) * (source.total / count)).astype(int).tolist()
        pixels = source.frames(indices, self.tile, self.tile, self.shown)
        text = "\n".join(f"Frame{number}: <img>{self.picture}</img>" for number in range(1, count + 1))
        return Picture(pixels, self.scale, text, (self.tokens,) * count)


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": GridPictures(facts), "video": TileVideos(facts)}
