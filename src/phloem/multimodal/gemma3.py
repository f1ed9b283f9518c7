"""Gemma 3: the whole picture as a square, between two tokens and blank lines."""

from __future__ import annotations

from typing import Any

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._pixels import HALF, as_array, resized, scale_of

BILINEAR = 2


class SquarePictures:
    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.settings
        config = facts.config
        vision: dict[str, Any] = config.get("vision_config") or {}
        size = settings.get("size") or {}
        self.side = int(size.get("height") or vision.get("image_size", 896))
        self.scale = scale_of(settings, HALF, HALF)
        self.tokens = int(config.get("mm_tokens_per_image", 256))
        self.placeholder = facts.text_of(config["image_token_id"])
        self.mark = self.inline = facts.text_of(config.get("boi_token_id", 255999))
        end = facts.text_of(config.get("eoi_token_id", 256000))
        self.text = f"\n\n{self.mark}{self.placeholder}{end}\n\n"

    def make(self, image: Any, /) -> Picture:
        pixels = as_array(resized(image, self.side, self.side, self.settings, BILINEAR))[None]
        return Picture(pixels, self.scale, self.text, (self.tokens,))


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": SquarePictures(facts)}
