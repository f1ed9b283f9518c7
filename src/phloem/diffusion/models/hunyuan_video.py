"""HunyuanVideo: films from a prompt that a language model reads; guidance as an input, true guidance on request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import TIMES, Row, negative_by_scale
from phloem.diffusion.films import Films
from phloem.diffusion.request import Condition, Guidance

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.messages import Draw
    from phloem.diffusion.request import Facts, Job

FPS = 24.0  # as the model's makers show its films


class HunyuanVideo(Films):
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    states_first = True
    sequences = block_lists
    texts_first = False

    def usual_side(self) -> tuple[int, int]:
        return int(self.default("width", 1280)), int(self.default("height", 720))

    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        frames = int(self.default("num_frames", 129))
        return self.of_length(facts, defaults, frames=frames, fps=FPS)

    def guidance(self, draw: Draw) -> Guidance:
        if draw.guidance_2 is not None:
            raise BadRequest("guidance_scale_2: this model has one transformer", param="guidance_scale_2")
        true = negative_by_scale(draw, "true_cfg_scale", None)
        distilled = self.transformer.config.guidance_embeds
        if not distilled and draw.guidance not in (None, 0.0, 1.0):
            raise BadRequest("guidance_scale: this model takes none: use true_cfg_scale", param="guidance_scale")
        scale = self.facts.guidance if draw.guidance is None else draw.guidance
        return Guidance(scale or 0.0 if distilled else 0.0, true.scale, true.negative)

    def modulated(self, block: Any, given: dict[str, Any]) -> Tensor:
        return block.norm1(given["hidden_states"], emb=given["temb"])[0]

    def encode(self, text: str) -> Condition:
        """Padding is told by a mask: it can be left out as well."""
        states, pooled, mask = self.pipe.encode_prompt(
            prompt=text, device=self.device, max_sequence_length=self.max_text
        )
        states_SE = states[0][mask[0].bool()]
        return Condition(states_SE.to(self.dtype), pooled[0].to(self.dtype), int(states_SE.shape[0]))

    def prepare(self, job: Job) -> None:
        job.key = (job.width, job.height, job.frames)
        job.latents = self.film_noise(job, int(self.transformer.config.in_channels))[0].to(self.device)
        tokens = self.latent_frames(job) * self.tokens(job.width, job.height)
        job.sigmas, job.times = self.schedule(job.steps, tokens)

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        lengths = torch.tensor([row.condition.states_SE.shape[0] for row in rows])
        states_BSE = torch.nn.utils.rnn.pad_sequence([row.condition.states_SE for row in rows], batch_first=True)
        mask_BS = torch.arange(states_BSE.shape[1])[None] < lengths[:, None]
        pooled = [row.condition.pooled_E for row in rows]
        guidance_B = torch.tensor([row.embedded for row in rows], dtype=self.dtype, device=self.device) * TIMES
        with self.around(rows):
            v_BCFHW = self.transformer(
                hidden_states=self.stack(rows),
                timestep=self.times(rows),
                encoder_hidden_states=states_BSE.to(self.dtype),
                encoder_attention_mask=mask_BS.to(self.device, self.dtype),
                pooled_projections=torch.stack([one for one in pooled if one is not None]).to(self.dtype),
                guidance=guidance_B if self.transformer.config.guidance_embeds else None,
                return_dict=False,
            )[0]
        return list(v_BCFHW.float())

    def finished(self, job: Job, latents: Tensor) -> NDArray[np.uint8]:
        """[frames, height, width, 3]."""
        z_1CFHW = latents[None].to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.shown(self.vae.decode(z_1CFHW, return_dict=False)[0][0])


PAINTER = HunyuanVideo
