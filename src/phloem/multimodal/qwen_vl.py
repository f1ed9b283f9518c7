"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one picture of any size, whose sides are multiples of two patches."""

from __future__ import annotations

import math
from typing import Any

from phloem.multimodal import Facts, Picture
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, HALF, as_array, resized, scale_of

MOST_RATIO = 200


class QwenPictures:
    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        size = settings.get("size") or {}
        patch = int(settings.get("patch_size") or vision.get("patch_size", 14))
        self.merge = int(settings.get("merge_size") or vision.get("spatial_merge_size", 2))
        self.block = patch * self.merge
        third = facts.config.get("model_type", "").startswith("qwen3")
        least, most = (256 * 256, 4096 * 4096) if third else (56 * 56, 28 * 28 * 1280)
        self.least = int(settings.get("min_pixels") or size.get("shortest_edge") or least)
        self.most = int(settings.get("max_pixels") or size.get("longest_edge") or most)
        self.scale = scale_of(settings, HALF if third else CLIP_MEAN, HALF if third else CLIP_STD)
        self.mark = self.placeholder = facts.text_of(facts.config["image_token_id"])
        around = [facts.config.get(key) for key in ("vision_start_token_id", "vision_end_token_id")]
        first, last = (facts.text_of(token) if isinstance(token, int) else "" for token in around)
        self.inline = first + self.mark + last

    def make(self, image: Any, /) -> Picture:
        width, height = self._fitting(*image.size)
        pixels = as_array(resized(image, width, height, self.settings))[None]
        return Picture(pixels, self.scale, self.mark, (width // self.block * (height // self.block),))

    def _fitting(self, width: int, height: int) -> tuple[int, int]:
        """The nearest size of whole blocks, with as many pixels as are allowed and about the same shape."""
        if max(width, height) > MOST_RATIO * min(width, height):
            raise ValueError(f"{width} x {height}: one side is more than {MOST_RATIO} times the other")
        block = self.block
        sides = [round(side / block) * block for side in (width, height)]
        if sides[0] * sides[1] > self.most:
            share = math.sqrt(width * height / self.most)
            sides = [max(block, math.floor(side / share / block) * block) for side in (width, height)]
        elif sides[0] * sides[1] < self.least:
            share = math.sqrt(self.least / (width * height))
            sides = [math.ceil(side * share / block) * block for side in (width, height)]
        return sides[0], sides[1]


def build(facts: Facts) -> QwenPictures:
    return QwenPictures(facts)
