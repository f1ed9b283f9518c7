"""FLUX.2 Klein: as FLUX.2, read by Qwen3, and guided by a second row unless it was distilled to draw without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.errors import BadRequest
from phloem.diffusion.models.flux_2 import Flux2
from phloem.diffusion.request import Guidance

if TYPE_CHECKING:
    from phloem.core.messages import Draw


class Flux2Klein(Flux2):
    def guidance(self, draw: Draw) -> Guidance:
        if draw.true_cfg is not None:
            raise BadRequest("true_cfg_scale: this model is guided by guidance_scale", param="true_cfg_scale")
        if not self.pipe.config.is_distilled:
            scale = self.facts.guidance if draw.guidance is None else draw.guidance
            return Guidance(scale=scale if scale is not None and scale > 1 else None, negative=draw.negative or "")
        for name, value in (("guidance_scale", draw.guidance), ("negative_prompt", draw.negative)):
            if value not in (None, 0.0, 1.0):
                raise BadRequest(f"{name}: this model was distilled to draw without", param=name)
        return Guidance()


PAINTER = Flux2Klein
