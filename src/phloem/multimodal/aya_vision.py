"""Aya Vision: InternVL's tiles, each with its number in front, and the whole of a picture behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal.internvl import GridPictures


class NumberedTiles(GridPictures):
    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        vision: dict[str, Any] = facts.config.get("vision_config") or {}
        side = self.tile // int(vision.get("patch_size", 14))
        self.tokens = (side // int(facts.config.get("downsample_factor", 2))) ** 2
        # Templates write a mark that is not what stands for its tokens.
        self.mark = self.inline = str(facts.more.get("image_token") or "<image>")

    def make(self, image: Any, /) -> Picture:
        made = super().make(image)
        one, count = self.placeholder, len(made.pixels)
        tiles = "".join(f"TILE_{number}{one}" for number in range(1, count)) + f"TILE_GLOBAL{one}"
        return replace(made, text=f"<|START_OF_IMG|>{tiles}<|END_OF_IMG|>", runs=(self.tokens,) * count)


def build(facts: Facts) -> dict[str, Processor]:
    return {"image": NumberedTiles(facts)}
