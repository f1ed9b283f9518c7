"""GLM-4.1V and 4.5V: pictures of any size, whose bounds count the two frames that a patch spans."""

from __future__ import annotations

from typing import Any

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._pixels import as_array, resized
from phloem.multimodal.qwen_vl import QwenPictures

BOUNDS = (112 * 112, 28 * 28 * 15000)


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


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": GlmPictures(facts)}
