"""LTX-Video: films from a prompt as tokens, steps by Euler; the model is told how fast frames follow each other."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import Family, Row, as_bytes
from phloem.diffusion.request import Condition

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.messages import Draw
    from phloem.diffusion.request import Facts, Guidance, Job


class LTX(Family):
    def __init__(self, pipe: Any, *args: Any) -> None:
        self._spatial, self._temporal = pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio
        self._patch = int(pipe.transformer_spatial_patch_size)
        super().__init__(pipe, *args)

    @property
    def grid(self) -> int:
        return lcm(self._spatial * self._patch, 32)  # the pipeline refuses all else

    def tokens(self, width: int, height: int) -> int:
        side = self._spatial * self._patch
        return (width // side) * (height // side)

    def usual_side(self) -> tuple[int, int]:
        return int(self.default("width", 704)), int(self.default("height", 512))

    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        frames, fps = int(self.default("num_frames", 161)), self.default("frame_rate", 25)
        return self.of_films(facts, defaults, frames=frames, grid=self._temporal, fps=fps)

    def guidance(self, draw: Draw) -> Guidance:
        for name, value in (("true_cfg_scale", draw.true_cfg), ("guidance_scale_2", draw.guidance_2)):
            if value is not None:
                raise BadRequest(f"{name}: this model is guided by guidance_scale", param=name)
        return super().guidance(draw)

    def encode(self, text: str) -> Condition:
        """Padding is told by a mask: it can be left out as well."""
        states, mask, _, _ = self.pipe.encode_prompt(
            prompt=text, do_classifier_free_guidance=False, max_sequence_length=self.max_text, device=self.device
        )
        states_SE = states[0][mask[0].bool()]
        return Condition(states_SE.to(self.dtype), None, int(states_SE.shape[0]))

    def prepare(self, job: Job) -> None:
        frames = (job.frames - 1) // self._temporal + 1
        sides = job.height // self._spatial, job.width // self._spatial
        shape = (1, int(self.transformer.config.in_channels), frames, *sides)
        noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(job.draw.seed))
        job.key = (job.width, job.height, job.frames)
        job.latents = self.pipe._pack_latents(noise, self._patch, 1)[0].to(self.device)
        job.sigmas, job.times = self.schedule(job.steps, frames * sides[0] * sides[1])

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        lengths = [row.condition.states_SE.shape[0] for row in rows]
        states_BSE = torch.nn.utils.rnn.pad_sequence([row.condition.states_SE for row in rows], batch_first=True)
        mask_BS = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        first, side = rows[0], self._spatial * self._patch
        height, width = first.height // side, first.width // side
        with self.around(rows):
            v_BLC = self.transformer(
                hidden_states=self.stack(rows),
                encoder_hidden_states=states_BSE.to(self.dtype),
                timestep=self.times(rows),
                encoder_attention_mask=mask_BS.to(self.device),
                num_frames=first.latents.shape[0] // (height * width),
                height=height,
                width=width,
                rope_interpolation_scale=(self._temporal / self.facts.fps, self._spatial, self._spatial),
                return_dict=False,
            )[0]
        return list(v_BLC.float())

    def finished(self, job: Job, latents: Tensor) -> NDArray[np.uint8]:
        """[frames, height, width, 3]. VAEs that finish the last step themselves are told that none is left."""
        vae, side = self.vae, self._spatial * self._patch
        frames = (job.frames - 1) // self._temporal + 1
        z_1CFHW = self.pipe._unpack_latents(
            latents[None], frames, job.height // side, job.width // side, self._patch, 1
        )
        mean, deviation = (value.to(z_1CFHW)[:, None, None, None] for value in (vae.latents_mean, vae.latents_std))
        z_1CFHW = (z_1CFHW * deviation / vae.config.scaling_factor + mean).to(vae.dtype)
        time = torch.zeros(1, device=self.device, dtype=vae.dtype) if vae.config.timestep_conditioning else None
        film_CFHW = vae.decode(z_1CFHW, time, return_dict=False)[0][0].float()
        return as_bytes((film_CFHW / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).cpu().numpy())


PAINTER = LTX
