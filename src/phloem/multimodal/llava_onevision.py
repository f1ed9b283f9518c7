"""LLaVA-OneVision: pictures as LLaVA-NeXT's, of more tiles than it keeps all patches of; videos of square frames."""

from __future__ import annotations

from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._aside import Film
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, MOST_PIXELS, scale_of
from phloem.multimodal._video import MOST_FRAMES
from phloem.multimodal.llava_next import TilesAndWhole

USUAL_FRAMES = 32


class SquareVideos:
    """A quarter of each frame's patches, and one token at the end."""

    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.video or facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        self.side = int(vision.get("image_size", 384))
        half = (self.side // int(vision.get("patch_size", 14)) + 1) // 2
        self.tokens = half * half
        self.scale = scale_of(settings, CLIP_MEAN, CLIP_STD)
        self.mark = self.inline = self.placeholder = facts.text_of(facts.config["video_token_id"])

    def make(self, source: Film, /) -> Picture:
        number, fps = source.wanted.num_frames, source.wanted.fps
        if number is None and fps is None:
            number, fps = self.settings.get("num_frames"), self.settings.get("fps")
        count = int(number or USUAL_FRAMES) if fps is None else int(source.total / source.fps * float(fps))
        count = max(1, min(count, source.total, MOST_FRAMES))
        if count * self.side**2 > MOST_PIXELS:
            raise ValueError(f"{count} frames have more than {MOST_PIXELS} pixels in all: ask for fewer")
        indices = (np.arange(count) * (source.total / count)).astype(int).tolist()
        pixels = source.frames(indices, self.side, self.side, self.settings)
        return Picture(pixels, self.scale, self.mark, (count * self.tokens + 1,))


def build(facts: Facts) -> dict[str, Processor]:
    most = str(facts.config.get("vision_aspect_ratio") or "anyres_max_9").rpartition("_")[2]
    return {"image": TilesAndWhole(facts, int(most)), "video": SquareVideos(facts)}
