"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, whose sides are multiples of two patches, and videos.

A video's frames are taken in pairs. Qwen2.5-VL tells its tokens by how many seconds lie between pairs; Qwen3-VL's are
told by texts in front of each pair, which stands by itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._aside import Film
from phloem.multimodal._pixels import CLIP_MEAN, CLIP_STD, HALF, MOST_PIXELS, as_array, resized, scale_of
from phloem.multimodal._video import MOST_FRAMES

MOST_RATIO = 200
USUAL_FPS = 2.0


class Sizes:
    """What pictures and videos have in common. `third`: of Qwen3-VL."""

    def __init__(self, facts: Facts, settings: dict[str, Any], token: str, bounds: tuple[int, int]) -> None:
        self.settings = settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        size = settings.get("size") or {}
        self.patch = int(settings.get("patch_size") or vision.get("patch_size", 14))
        self.block = self.patch * int(settings.get("merge_size") or vision.get("spatial_merge_size", 2))
        self.least = int(settings.get("min_pixels") or size.get("shortest_edge") or bounds[0])
        self.most = int(settings.get("max_pixels") or size.get("longest_edge") or bounds[1])
        third = _third(facts)
        self.scale = scale_of(settings, HALF if third else CLIP_MEAN, HALF if third else CLIP_STD)
        self.mark = self.placeholder = facts.text_of(facts.config[token])
        around = [facts.config.get(key) for key in ("vision_start_token_id", "vision_end_token_id")]
        self.first, self.last = (facts.text_of(token) if isinstance(token, int) else "" for token in around)
        self.inline = self.first + self.mark + self.last

    def fitting(
        self, size: tuple[int, int], least: float, most: float, frames: int = 1, even: int = 1
    ) -> tuple[int, int]:
        """The nearest size of whole blocks, with as many pixels as are allowed and about the same shape.

        Args:
            frames: which all pixels are counted of; `even`: the same in whole pairs.
        """
        width, height = size
        if max(width, height) > MOST_RATIO * min(width, height):
            raise ValueError(f"{width} x {height}: one side is more than {MOST_RATIO} times the other")
        block = self.block
        sides = [round(side / block) * block for side in (width, height)]
        pixels = sides[0] * sides[1] * even
        if pixels > most:
            share = math.sqrt(frames * width * height / most)
            sides = [max(block, math.floor(side / share / block) * block) for side in (width, height)]
        elif pixels < least:
            share = math.sqrt(least / (frames * width * height))
            sides = [math.ceil(side * share / block) * block for side in (width, height)]
        return sides[0], sides[1]


class QwenPictures(Sizes):
    def __init__(self, facts: Facts) -> None:
        bounds = (256 * 256, 4096 * 4096) if _third(facts) else (56 * 56, 28 * 28 * 1280)
        super().__init__(facts, facts.settings, "image_token_id", bounds)

    def make(self, source: Any, /) -> Picture:
        width, height = self.fitting(source.size, self.least, self.most)
        pixels = as_array(resized(source, width, height, self.settings))[None]
        columns, rows = width // self.block, height // self.block
        return Picture(pixels, self.scale, self.mark, (columns * rows,), grids=((1, rows, columns),))


class QwenVideos(Sizes):
    """Bounds of pixels are those of a frame; of Qwen3-VL those of all frames."""

    def __init__(self, facts: Facts) -> None:
        third = _third(facts)
        size = 32 if third else 28
        bounds = (128 * size**2, 768 * size**2)
        # Where a checkpoint says nothing of videos, what it says of the pixels of pictures does not hold.
        shared = {
            key: value for key, value in facts.settings.items() if key not in ("min_pixels", "max_pixels", "size")
        }
        super().__init__(facts, facts.video or shared, "video_token_id", bounds)
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        settings = self.settings
        self.frames = int(settings.get("temporal_patch_size") or vision.get("temporal_patch_size", 2))
        self.least_frames = int(settings.get("min_frames") or 4)
        self.most_frames = min(int(settings.get("max_frames") or MOST_FRAMES), MOST_FRAMES)
        self.num_frames, self.fps = settings.get("num_frames"), settings.get("fps")
        self.capped, self.most_tokens = bool(settings.get("cap_pixels_per_frame")), settings.get("max_video_tokens")
        self.third = third
        # Only the places in time of Qwen2.5-VL and Omni are of seconds.
        second = facts.config.get("model_type", "").startswith(("qwen2_5", "qwen3_omni"))
        rate = facts.config.get("position_id_per_seconds") or vision.get("tokens_per_second", 4)
        self.per_second = float(rate) if second else 0.0
        if third:
            self.mark = self.inline  # texts stand between the tokens that stand around it

    def make(self, source: Film, /) -> Picture:
        indices = self._indices(source)
        steps = -(-len(indices) // self.frames)
        width, height = self._size(source.size, len(indices))
        if width * height * len(indices) > MOST_PIXELS:
            raise ValueError(
                f"{len(indices)} frames of {width} x {height} pixels are more than {MOST_PIXELS} in all: "
                "ask for fewer (num_frames, fps)"
            )
        pixels = source.frames(indices, width, height, self.settings)
        columns, rows = width // self.block, height // self.block
        count = columns * rows
        if self.third:
            text = "".join(f"<{seconds:.1f} seconds>{self.inline}" for seconds in self._seconds(indices, source.fps))
            return Picture(pixels, self.scale, text, (count,) * steps, grids=((1, rows, columns),) * steps)
        times: tuple[int, ...] = ()
        if self.per_second:
            sampled = len(indices) / source.total * source.fps
            interval = np.float32(self.per_second) * np.float32(self.frames / sampled)
            times = tuple((np.arange(steps, dtype=np.float32) * interval).astype(np.int64).tolist())
        grids = ((steps, rows, columns),)
        return Picture(pixels, self.scale, self.mark, (steps * count,), grids=grids, times=times)

    def _indices(self, video: Film) -> list[int]:
        """Of the frames that are shown: evenly spread, in whole pairs where the video has them."""
        total, unit, wanted = video.total, self.frames, video.wanted
        number, fps = wanted.num_frames, wanted.fps
        if number is None and fps is None:
            number, fps = self.num_frames, self.fps
        if number is not None:
            count = round(int(number) / unit) * unit if not self.third else int(number)
        else:
            count = total / video.fps * float(fps or USUAL_FPS)
            most = self.most_frames if self.third else min(self.most_frames, total) // unit * unit
            count = int(min(max(count, self.least_frames), most, total))
            count = count if self.third else count // unit * unit
        count = max(1, min(count, total, self.most_frames))
        if self.third:
            return np.linspace(0, total - 1, count).round().astype(int).tolist()
        return (np.arange(count) * (total / count)).astype(int).tolist()

    def _size(self, size: tuple[int, int], count: int) -> tuple[int, int]:
        block, area = self.block, self.block**2
        if not self.third:
            most = self.most
            if self.capped:
                whole = int(int(self.most_tokens or 128_000) * area * 0.9)
                most = max(min(most, whole * self.frames // count), int(self.least * 1.05))
            return self.fitting(size, self.least, most)
        whole = self.most
        if self.capped:
            whole = count * max(min(int(self.most_tokens or 768) * area, whole // count), int(self.least * 1.05))
        width, height = size
        if min(width, height) < block:
            larger = max(block / width, block / height)
            width, height = int(width * larger), int(height * larger)
        even = max(1, round(count / self.frames)) * self.frames
        return self.fitting((width, height), self.least, whole, count, even)

    def _seconds(self, indices: list[int], fps: float) -> list[float]:
        """In the middle of each pair."""
        unit = self.frames
        filled = indices + [indices[-1]] * (-len(indices) % unit)
        return [(filled[at] + filled[at + unit - 1]) / fps / 2 for at in range(0, len(filled), unit)]


def _third(facts: Facts) -> bool:
    return facts.config.get("model_type", "").startswith("qwen3_vl")


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": QwenPictures(facts), "video": QwenVideos(facts)}
