"""LLaVA-NeXT-Video: pictures as LLaVA-NeXT's; of each frame of a video the square in its middle."""

from __future__ import annotations

from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._aside import Film
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, MOST_PIXELS, scale_of
from phloem.multimodal._video import MOST_FRAMES
from phloem.multimodal.llava_next import TilesAndWhole

USUAL_FRAMES = 8


class MiddleVideos:
    """Of each frame as many tokens as its patches make squares of `spatial_pool_stride` each way."""

    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.video or facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        self.side = int(vision.get("image_size", 336))
        self.shortest = int((settings.get("size") or {}).get("shortest_edge", self.side))
        if self.shortest < self.side:
            raise ValueError(f"size: frames of less than {self.side} pixels")
        pooled = self.side // int(vision.get("patch_size", 14)) // int(facts.config.get("spatial_pool_stride") or 2)
        self.tokens = pooled**2
        self.scale = scale_of(settings, CLIP_MEAN, CLIP_STD)
        self.mark = self.inline = self.placeholder = facts.text_of(facts.config["video_token_id"])

    def make(self, source: Film, /) -> Picture:
        number, fps = source.wanted.num_frames, source.wanted.fps
        if number is None and fps is None:
            number, fps = self.settings.get("num_frames"), self.settings.get("fps")
        count = int(number or USUAL_FRAMES) if fps is None else int(source.total / source.fps * float(fps))
        count = max(1, min(count, source.total, MOST_FRAMES))
        indices = (np.arange(count) * (source.total / count)).astype(int).tolist()
        short, side = min(source.size), self.side
        width, height = (max(self.shortest, int(self.shortest * each / short)) for each in source.size)
        if count * width * height > MOST_PIXELS:
            raise ValueError(
                f"{count} frames of {width} x {height} pixels are more than {MOST_PIXELS} in all: "
                "ask for fewer (num_frames, fps)"
            )
        left, top = (width - side) // 2, (height - side) // 2
        frames = source.frames(indices, width, height, self.settings)[:, top : top + side, left : left + side]
        return Picture(np.ascontiguousarray(frames), self.scale, self.mark, (count * self.tokens,))


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": TilesAndWhole(facts), "video": MiddleVideos(facts)}
