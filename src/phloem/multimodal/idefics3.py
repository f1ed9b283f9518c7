"""SmolVLM and Idefics3: a picture in tiles, row by row, and the whole of it as one more tile; videos of SmolVLM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._aside import Film
from phloem.multimodal._pixels import HALF, MOST_PIXELS, as_array, resized, scale_of
from phloem.multimodal._video import MOST_FRAMES

LANCZOS = 1
MOST_SIDE = 4096
USUAL_FRAMES, USUAL_FPS = 64, 1.0
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


class TiledPictures:
    def __init__(self, facts: Facts) -> None:
        settings = self.settings = facts.settings
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        self.longest = int((settings.get("size") or {}).get("longest_edge", 4 * 364))
        self.tile = int((settings.get("max_image_size") or {}).get("longest_edge", 364))
        self.splits = bool(settings.get("do_image_splitting", True))
        self.resizes = bool(settings.get("do_resize", True))
        self.scale = scale_of(settings, HALF, HALF)
        side = self.tile // int(vision.get("patch_size", 32))
        self.tokens = side * side // int(facts.config.get("scale_factor", 2)) ** 2
        self.mark = self.inline = self.placeholder = facts.text_of(facts.config["image_token_id"])

    def make(self, image: Any, /) -> Picture:
        tile = self.tile
        if self.resizes:
            image = resized(image, *self._longest(*image.size), self.settings, LANCZOS)
        if not self.splits:
            return self._whole(resized(image, tile, tile, self.settings, LANCZOS))
        image = resized(image, *self._tiled(*image.size), self.settings, LANCZOS)
        columns, rows = (side // tile for side in image.size)
        if columns * rows == 1:
            return self._whole(image)
        pixels = as_array(image).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        whole = as_array(resized(image, tile, tile, self.settings, LANCZOS))[None]
        around, placeholder = "<fake_token_around_image>", self.placeholder
        lines = [
            "".join(f"{around}<row_{row + 1}_col_{column + 1}>{placeholder}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        text = "".join(lines) + f"\n{around}<global-img>{placeholder}{around}"
        return Picture(np.concatenate([pixels, whole]), self.scale, text, (self.tokens,) * (columns * rows + 1))

    def _whole(self, image: Any) -> Picture:
        around = "<fake_token_around_image>"
        text = f"{around}<global-img>{self.placeholder}{around}"
        return Picture(as_array(image)[None], self.scale, text, (self.tokens,))

    def _longest(self, width: int, height: int) -> tuple[int, int]:
        """With the longest side as long as asked for, and the other one even."""
        ratio = width / height
        if width >= height:
            width, height = self.longest, int(self.longest / ratio)
            height += height % 2
        else:
            width, height = int(self.longest * ratio), self.longest
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        ratio = width / height
        if width >= height and width > MOST_SIDE:
            width, height = MOST_SIDE, int(MOST_SIDE / ratio)
        elif height > MOST_SIDE:
            width, height = int(MOST_SIDE * ratio), MOST_SIDE
        return max(width, 1), max(height, 1)

    def _tiled(self, width: int, height: int) -> tuple[int, int]:
        """The next size of whole tiles."""

        def whole(side: float) -> int:
            return math.ceil(side / self.tile) * self.tile

        ratio = width / height
        if width >= height:
            width = whole(width)
            return width, whole(int(width / ratio))
        height = whole(height)
        return whole(int(height * ratio)), height


class TileVideos(TiledPictures):
    """Each frame as one tile, with its time in front; how many they are, and of how long a video, is said first."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        shown = self.shown = {**self.settings, **facts.video}
        # Older checkpoints have all that they say of frames together.
        sampling: dict[str, Any] = shown.get("video_sampling") or {}
        size = sampling.get("video_size") or shown.get("size") or {}
        self.longest = int(size.get("longest_edge", self.longest))
        self.tile = int((shown.get("max_image_size") or {}).get("longest_edge", self.tile))
        self.num_frames = int(sampling.get("max_frames") or shown.get("num_frames") or USUAL_FRAMES)
        self.fps = float(sampling.get("fps") or shown.get("fps") or USUAL_FPS)
        self.filter = {"resample": LANCZOS if shown.get("resample") is None else shown["resample"]}
        self.scale = scale_of(shown, HALF, HALF)
        self.mark = self.inline = "<video>"

    def make(self, source: Film, /) -> Picture:
        from PIL import Image

        tile, indices = self.tile, self._indices(source)
        width, height = self._longest(*source.size)
        if len(indices) * tile**2 > MOST_PIXELS:
            raise ValueError(f"{len(indices)} frames have more than {MOST_PIXELS} pixels in all: ask for fewer")
        # On their way to squares frames may be many times larger: a few at a time.
        few = max(1, MOST_PIXELS // 8 // (width * height))
        squares = [
            as_array(resized(Image.fromarray(frame), tile, tile, self.filter))
            for at in range(0, len(indices), few)
            for frame in source.frames(indices[at : at + few], width, height, self.filter)
        ]
        return Picture(np.stack(squares), self.scale, self._text(indices, source), (self.tokens,) * len(indices))

    def _text(self, indices: list[int], source: Film) -> str:
        around, whole = "<fake_token_around_image>", int(source.total / source.fps)
        length = f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
        text = (
            f"You are provided the following series of {_in_words(len(indices))} frames from a {length} [H:MM:SS] "
            "video.\n"
        )
        for index in indices:
            second = int(index / source.fps)
            text += f"\nFrame from {second // 60:02}:{second % 60:02}:{around}<global-img>{self.placeholder}{around}"
        return text + "\n\n"

    def _indices(self, video: Film) -> list[int]:
        """Evenly spread; of a long video without its first and last second."""
        total, fps, most = video.total, self.fps, self.num_frames
        seconds = total / video.fps
        if video.wanted.fps is not None:
            fps, most = video.wanted.fps, MOST_FRAMES
        count = video.wanted.num_frames or max(1, min(round(fps * seconds), most))
        first, last = 0, total - 1
        if seconds - 2 > most * fps:
            first, last = int(video.fps), min(int(total - video.fps), last)
            first, last = (first, last) if first < last else (0, total - 1)
        return np.unique(np.linspace(first, last, min(count, total, MOST_FRAMES), dtype=int)).tolist()


def _in_words(number: int) -> str:
    """A number below a thousand."""
    small, tens = _SMALL.split(), _TENS.split()
    if number >= 100:
        rest = number % 100
        return f"{small[number // 100]} hundred" + (f" and {_in_words(rest)}" if rest else "")
    if number < len(small):
        return small[number]
    return tens[number // 10 - 2] + (f"-{small[number % 10]}" if number % 10 else "")


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": TiledPictures(facts), "video": TileVideos(facts)}
