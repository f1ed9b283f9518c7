"""LTX-Video: films from a prompt, or from a picture that they begin with; tokens, and steps by Euler.

The model is told how fast frames follow each other: its positions in time are seconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import Row, image_of
from phloem.diffusion.films import Films
from phloem.diffusion.request import Condition, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.messages import Draw
    from phloem.diffusion.request import Facts, Guidance, Job


class LTX(Films):
    pixels = 32
    sequences = ("transformer_blocks",)
    attentions = ("attn1",)
    joint_texts = False

    @staticmethod
    def compression(pipe: Any) -> tuple[int, int, int]:
        patch = int(pipe.transformer_spatial_patch_size)
        return pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio, patch

    def usual_side(self) -> tuple[int, int]:
        return int(self.default("width", 704)), int(self.default("height", 512))

    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        """A folder of either pipeline has the weights of both."""
        frames, fps = int(self.default("num_frames", 161)), self.default("frame_rate", 25)
        return replace(self.of_length(facts, defaults, frames=frames, fps=fps), pictures=1)

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
        generator = torch.Generator("cpu").manual_seed(job.draw.seed)
        first = self._first_frame(job, generator) if job.draw.pictures else None
        noise = self.film_noise(job, int(self.transformer.config.in_channels), generator)
        latents = self.pipe._pack_latents(noise, self._patch, 1)[0].to(self.device)
        if first is not None:
            latents[: first.shape[0]] = first
            job.seen = Seen(first)
        job.latents = latents
        job.key = (job.width, job.height, job.frames, first is None)
        job.sigmas, job.times = self.schedule(job.steps, noise[0, 0].numel())

    def _first_frame(self, job: Job, generator: torch.Generator) -> Tensor:
        """[tokens of a frame, C] of the picture that the film begins with; the VAE's distribution is drawn from."""
        found = self.pipe.video_processor.preprocess(image_of(job.draw.pictures[0]), height=job.height, width=job.width)
        frame_1C1HW = found.to(self.device, self.vae.dtype)[:, :, None]
        z_1C1HW = self.vae.encode(frame_1C1HW).latent_dist.sample(generator).float()
        mean, deviation = self._statistics(z_1C1HW)
        z_1C1HW = (z_1C1HW - mean) * self.vae.config.scaling_factor / deviation
        return self.pipe._pack_latents(z_1C1HW, self._patch, 1)[0]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the deviation of the VAE's latents, for [B, C, F, H, W]."""
        mean, deviation = (one.to(like)[:, None, None, None] for one in (self.vae.latents_mean, self.vae.latents_std))
        return mean, deviation

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
                timestep=self._times_of(rows),
                encoder_attention_mask=mask_BS.to(self.device),
                num_frames=first.latents.shape[0] // (height * width),
                height=height,
                width=width,
                rope_interpolation_scale=(self._pace(rows), self._spatial, self._spatial),
                return_dict=False,
            )[0]
        return list(v_BLC.float())

    def by_token(self, given: dict[str, Any], part: Callable[[Tensor, int], Tensor], tokens: int) -> dict[str, Any]:
        if given["temb"].shape[1] == tokens:  # a time for each
            given["temb"] = part(given["temb"], 1)
        return super().by_token(given, part, tokens)

    def _pace(self, rows: Sequence[Row]) -> Tensor:
        """[B, 1, 1, 1, 1] seconds from one latent frame to the next: rows may have rates of their own."""
        rates = [self._temporal / (row.fps or self.facts.fps) for row in rows]
        return torch.tensor(rates, dtype=torch.float32, device=self.device)[:, None, None, None, None]

    def _times_of(self, rows: Sequence[Row]) -> Tensor:
        """One a row; where films begin with a picture one a token, 0 for those of that picture."""
        times_B = self.times(rows)
        if rows[0].seen is None:
            return times_B
        times_BL = times_B[:, None].repeat(1, rows[0].latents.shape[0])
        times_BL[:, : rows[0].seen.latents.shape[0]] = 0
        return times_BL

    def advanced(self, job: Job, v: Tensor) -> tuple[Tensor, Any]:
        """The picture that a film begins with stays as it is."""
        latents, stepper = super().advanced(job, v)
        if job.seen is not None:
            latents[: job.seen.latents.shape[0]] = job.seen.latents
        return latents, stepper

    def finished(self, job: Job, latents: Tensor) -> NDArray[np.uint8]:
        """[frames, height, width, 3]. VAEs that finish the last step themselves are told that none is left."""
        vae, side = self.vae, self._spatial * self._patch
        z_1CFHW = self.pipe._unpack_latents(
            latents[None], self.latent_frames(job), job.height // side, job.width // side, self._patch, 1
        )
        mean, deviation = self._statistics(z_1CFHW)
        z_1CFHW = (z_1CFHW * deviation / vae.config.scaling_factor + mean).to(vae.dtype)
        time = torch.zeros(1, device=self.device, dtype=vae.dtype) if vae.config.timestep_conditioning else None
        return self.shown(vae.decode(z_1CFHW, time, return_dict=False)[0][0])


PAINTER = LTX
