"""GLM-4.1V and 4.5V: pictures of any size, whose bounds count the two frames that a patch spans, and videos.

A video is its pairs of frames, each like a picture, with the second of the first of both behind it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._aside import Film
from phloem.multimodal._pixels import MOST_PIXELS, as_array, resized
from phloem.multimodal._video import MOST_FRAMES
from phloem.multimodal.qwen_vl import QwenPictures, Sizes

BOUNDS = (112 * 112, 28 * 28 * 15000)
VIDEO_BOUNDS = (112 * 112, 28 * 28 * 2 * 30000)  # of all frames
USUAL_FPS = 2.0
LONG = 300.0  # seconds, beyond which as many frames are spread as those of so long


class GlmPictures(QwenPictures):
    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        size = self.settings.get("size") or {}
        bounds = [
            size.get(f"{edge}_edge") or usual for edge, usual in zip(("shortest", "longest"), BOUNDS, strict=True)
        ]
        self.least, self.most = (int(bound) for bound in bounds)
        self.frames = int(self.settings.get("temporal_patch_size") or 2)
        ends = [facts.text_of(int(facts.config[f"image_{end}_token_id"])) for end in ("start", "end")]
        self.inline = self.mark.join(ends)

    def make(self, source: Any, /) -> Picture:
        width, height = source.size
        if min(width, height) < self.block:
            larger = max(self.block / width, self.block / height)
            width, height = int(width * larger), int(height * larger)
        width, height = self.fitting((width, height), self.least, self.most, self.frames, self.frames)
        pixels = as_array(resized(source, width, height, self.settings))[None]
        columns, rows = width // self.block, height // self.block
        return Picture(pixels, self.scale, self.mark, (columns * rows,), grids=((1, rows, columns),))


class GlmVideos(Sizes):
    def __init__(self, facts: Facts) -> None:
        # Where a checkpoint says nothing of videos, what it says of the pixels of pictures does not hold.
        shared = {key: value for key, value in facts.settings.items() if key != "size"}
        super().__init__(facts, facts.video or shared, "video_token_id", VIDEO_BOUNDS)
        settings, config = self.settings, facts.config
        self.frames = int(settings.get("temporal_patch_size") or 2)
        self.fps, self.long = float(settings.get("fps") or USUAL_FPS), float(settings.get("max_duration") or LONG)
        self.placeholder = facts.text_of(config["image_token_id"])
        self.inline = self.mark.join(facts.text_of(int(config[f"video_{end}_token_id"])) for end in ("start", "end"))
        ends = [facts.text_of(int(config[f"image_{end}_token_id"])) for end in ("start", "end")]
        self.frame = self.placeholder.join(ends)

    def make(self, source: Film, /) -> Picture:
        indices = self._indices(source)
        count, (width, height) = len(indices), source.size
        if min(width, height) < self.block:
            larger = max(self.block / width, self.block / height)
            width, height = int(width * larger), int(height * larger)
        width, height = self.fitting((width, height), self.least, self.most, count, count)
        if width * height * count > MOST_PIXELS:
            raise ValueError(
                f"{count} frames of {width} x {height} pixels are more than {MOST_PIXELS} in all: "
                "ask for fewer (num_frames, fps)"
            )
        pixels = source.frames(indices, width, height, self.settings)
        columns, rows = width // self.block, height // self.block
        steps = count // self.frames
        text = "".join(f"{self.frame}{int(index / source.fps)}" for index in indices[:: self.frames])
        runs, grids = (columns * rows,) * steps, ((1, rows, columns),) * steps
        return Picture(pixels, self.scale, text, runs, grids=grids)

    def _indices(self, video: Film) -> list[int]:
        """Of the frames that are shown, each once, the last one again where a pair lacks one."""
        total, last = video.total, video.total - 1
        number, fps = video.wanted.num_frames, video.wanted.fps or self.fps
        seconds = total / video.fps
        if number is not None:
            chosen = np.linspace(0, last, min(number, total)).round().astype(int).tolist()
        elif seconds <= self.long:
            count = max(int(seconds * fps), 1)
            chosen = [min(last, math.ceil(at * video.fps / fps)) for at in range(min(count, 2 * total))]
        elif int(self.long * fps) >= total:
            chosen = list(range(total))
        else:
            spread = np.linspace(0, seconds, int(self.long * fps))
            chosen = [min(last, math.ceil(at * video.fps)) for at in spread.tolist()]
        found = sorted(set(chosen))
        if len(found) > MOST_FRAMES:
            found = [found[at] for at in np.linspace(0, len(found) - 1, MOST_FRAMES).round().astype(int).tolist()]
        return found + found[-1:] * (-len(found) % self.frames)


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": GlmPictures(facts), "video": GlmVideos(facts)}
