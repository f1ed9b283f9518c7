"""LLaVA 1.5: one square in the middle of a picture, or the whole of it made square; with Pixtral's tower as Pixtral."""

from __future__ import annotations

from typing import Any

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, HALF, as_array, resized, scale_of
from phloem.multimodal.pixtral import PixtralPictures


class SquarePictures:
    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        self.side = int(vision.get("image_size", 224))
        clip = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
        self.scale = scale_of(settings, CLIP_MEAN if clip else HALF, CLIP_STD if clip else HALF)
        self.shortest = (settings.get("size") or {"shortest_edge": self.side} if clip else {}).get("shortest_edge")
        dropped = facts.config.get("vision_feature_select_strategy", "default") == "default"
        count = (self.side // int(vision.get("patch_size", 14))) ** 2
        self.tokens = count + (0 if clip else -1 if dropped else 0) + (1 if clip and not dropped else 0)
        self.mark = self.inline = self.placeholder = facts.text_of(facts.config["image_token_id"])

    def make(self, image: Any, /) -> Picture:
        side = self.side
        if self.shortest:
            width, height = image.size
            short = min(width, height)
            sizes = [int(self.shortest * each / short) if each != short else self.shortest for each in image.size]
            image = resized(image, sizes[0], sizes[1], self.settings)
            left, top = (sizes[0] - side) // 2, (sizes[1] - side) // 2
            image = image.crop((left, top, left + side, top + side))
        else:
            image = resized(image, side, side, self.settings)
        return Picture(as_array(image)[None], self.scale, self.mark, (self.tokens,))


def build(facts: Facts) -> dict[str, Processor]:
    vision: dict[str, Any] = facts.config.get("vision_config") or {}
    kind = PixtralPictures if vision.get("model_type") == "pixtral" else SquarePictures
    return {"image": kind(facts)}
