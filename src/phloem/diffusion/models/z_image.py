"""Z-Image and Z-Image-Turbo: rows as lists, so that sizes and prompt lengths mix; the output has the other sign."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import TIMES, Family, Row
from phloem.diffusion.request import Condition, Guidance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.messages import Draw
    from phloem.diffusion.request import Job

USUAL_SIDE = 1024  # pixels: the pipeline has no such fact, its VAE has


TEXT_BLOCK = 32  # the model pads texts to multiples of so many tokens


class ZImage(Family):
    mixed_sizes = True
    block_lists = ("layers",)
    states = "x"
    sequences = block_lists
    attentions = ("attention",)
    joint_texts = False  # texts stand among the tokens, and are shared out as they are

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        places = int(self.transformer.config.axes_lens[0])  # of a text, and of the picture behind it
        self.max_text = min(self.max_text, (places - 2) // TEXT_BLOCK * TEXT_BLOCK)

    def usual_side(self) -> int:
        return int(self.vae.config.get("sample_size") or USUAL_SIDE)

    def guidance(self, draw: Draw) -> Guidance:
        """Guidance counts from 0 here: the prompt alone is 0, not 1."""
        if draw.true_cfg is not None:
            raise BadRequest("true_cfg_scale: this model is guided by guidance_scale", param="true_cfg_scale")
        most = min(self.transformer.config.axes_lens[1:])
        if max(self.facts.size(draw)) // self.grid > most:
            raise BadRequest(f"size: a side has at most {most * self.grid} pixels with this model", param="size")
        scale = self.facts.guidance if draw.guidance is None else draw.guidance
        return Guidance(scale=scale if scale is not None and scale > 0 else None, negative=draw.negative or "")

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return positive + scale * (positive - negative)

    @property
    def heads(self) -> int:
        return int(self.transformer.config.n_heads)

    def modulated(self, block: Any, given: dict[str, Any]) -> Tensor:
        scale_BC = block.adaLN_modulation(given["adaln_input"]).chunk(4, dim=1)[0]
        return block.attention_norm1(given["x"]) * (1 + scale_BC[:, None])

    def apart(self, job: Job) -> None:
        """What a step cache keeps has the length of its pass: such rows share steps with those of equal lengths."""
        super().apart(job)
        if job.kept:
            texts = tuple(-(-one.states_SE.shape[0] // TEXT_BLOCK) for one in job.conditions)
            job.key = (job.key, job.width, job.height, texts)

    def encode(self, text: str) -> Condition:
        found, _ = self.pipe.encode_prompt(
            prompt=text, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_text
        )
        return Condition(found[0], None, int(found[0].shape[0]))

    def noise(self, width: int, height: int, generator: torch.Generator) -> Tensor:
        factor, channels = self.grid // 2, self.transformer.in_channels
        return torch.randn((1, channels, height // factor, width // factor), generator=generator)[0]

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        with self.around(rows):
            found = self.transformer(
                [row.latents.to(self.dtype)[:, None] for row in rows],
                (TIMES - self.times(rows)) / TIMES,
                [row.condition.states_SE.to(self.dtype) for row in rows],
                return_dict=False,
            )[0]
        return [-v_C1HW[:, 0].float() for v_C1HW in found]


PAINTER = ZImage
