"""DeepSeek-VL: the whole of a picture in the middle of a square."""

from __future__ import annotations

from typing import Any

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, as_array, resized, scale_of

LEAST_SIDE = 14


class FramedPictures:
    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        self.side = int(vision.get("image_size", 384))
        if int((settings.get("size") or {}).get("height", self.side)) != self.side:
            raise ValueError(f"size: squares of {self.side} pixels are read")
        self.least = int(settings.get("min_size") or LEAST_SIDE)
        self.border = tuple(int(share * 255) for share in settings.get("image_mean") or CLIP_MEAN)
        self.scale = scale_of(settings, CLIP_MEAN, CLIP_STD)
        self.tokens = (self.side // int(vision.get("patch_size", 16))) ** 2
        self.mark = self.inline = self.placeholder = facts.text_of(facts.config["image_token_id"])

    def make(self, image: Any, /) -> Picture:
        from PIL import Image

        share = self.side / max(image.size)
        width, height = (max(round(each * share), self.least) for each in image.size)
        canvas = Image.new("RGB", (self.side, self.side), self.border)
        canvas.paste(
            resized(image, width, height, self.settings), ((self.side - width) // 2, (self.side - height) // 2)
        )
        return Picture(as_array(canvas)[None], self.scale, self.mark, (self.tokens,))


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": FramedPictures(facts)}
