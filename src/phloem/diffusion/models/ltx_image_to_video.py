"""LTX-Video whose films begin with a picture; its folder has the same weights as that of films from a prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.diffusion.models.ltx import LTX

if TYPE_CHECKING:
    from phloem.diffusion.request import Facts


class LTXImageToVideo(LTX):
    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        return replace(super().known(facts, defaults), needs_pictures=True)


PAINTER = LTXImageToVideo
