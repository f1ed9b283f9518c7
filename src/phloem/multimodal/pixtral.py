"""Pixtral and Mistral Small 3.1: a picture of any size up to a longest side, with a token behind each row."""

from __future__ import annotations

import math
from typing import Any

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, as_array, resized, scale_of


class PixtralPictures:
    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        self.block = int(vision.get("patch_size", 16)) * int(facts.config.get("spatial_merge_size", 1))
        self.longest = int((settings.get("size") or {}).get("longest_edge", vision.get("image_size", 1024)))
        self.scale = scale_of(settings, CLIP_MEAN, CLIP_STD)
        self.mark = self.inline = self.placeholder = facts.text_of(facts.config["image_token_id"])
        self.row = str(facts.more.get("image_break_token", "[IMG_BREAK]"))
        self.end = str(facts.more.get("image_end_token", "[IMG_END]"))

    def make(self, image: Any, /) -> Picture:
        width, height = image.size
        ratio = max(width, height) / self.longest
        if ratio > 1:
            width, height = math.floor(width / ratio), math.floor(height / ratio)
        columns, rows = (max(1, (side - 1) // self.block + 1) for side in (width, height))
        pixels = as_array(resized(image, columns * self.block, rows * self.block, self.settings))[None]
        text = self.row.join([self.mark] * rows) + self.end
        return Picture(pixels, self.scale, text, (columns,) * rows)


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": PixtralPictures(facts)}
