"""Wan 2.1 and 2.2 whose films begin with a picture: its latents beside the noise, and in 2.1 what CLIP sees in it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.diffusion.family import image_of
from phloem.diffusion.models.wan import Wan

if TYPE_CHECKING:
    from phloem.core.messages import Pixels
    from phloem.diffusion.request import Facts, Job, Seen


class WanImageToVideo(Wan):
    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        return replace(super().known(facts, defaults), pictures=1, needs_pictures=True)

    def look(self, picture: Pixels, job: Job) -> Seen:
        found = super().look(picture, job)
        if self.transformer.config.image_dim is None:
            return found
        return replace(found, embeds_SE=self.pipe.encode_image(image_of(picture), self.device)[0])


PAINTER = WanImageToVideo
