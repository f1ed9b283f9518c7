"""FLUX.1 Kontext: the picture that is to be changed stands as tokens behind those of the new one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.diffusion.family import image_of, packed
from phloem.diffusion.models.flux import Flux
from phloem.diffusion.request import Seen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.core.messages import Pixels
    from phloem.diffusion.request import Facts


class FluxKontext(Flux):
    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        return replace(facts, pictures=1)

    def seen(self, pictures: Sequence[Pixels]) -> Seen:
        """In the one of the sizes that it was trained on whose shape is nearest."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        (picture,) = pictures
        shape = picture.width / picture.height
        _, width, height = min((abs(shape - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        width, height = width // self.grid * self.grid, height // self.grid * self.grid
        image = self.pipe.image_processor.resize(image_of(picture), height, width)
        latents_CHW = self.compressed(self.pipe.image_processor.preprocess(image, height, width))
        return Seen(packed(latents_CHW), ((height // self.grid, width // self.grid),))


PAINTER = FluxKontext
