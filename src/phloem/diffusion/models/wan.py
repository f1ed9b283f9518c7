"""Wan 2.1 and 2.2: films from a prompt; two transformers in turn (A14B), or a first frame that is given (5B).

The schedule is UniPC's: a step depends on those before it, so that each film has a scheduler of its own.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import Row, image_of
from phloem.diffusion.films import Films
from phloem.diffusion.request import Condition, Guidance, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.messages import Draw, Pixels
    from phloem.diffusion.request import Facts, Job

FPS, FPS_5B = 16.0, 24.0  # as the model cards have it


class Wan(Films):
    block_lists = ("blocks",)
    sequences = block_lists
    attentions = ("attn1",)
    joint_texts = False
    schedulers = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")

    def __init__(self, pipe: Any, *args: Any) -> None:
        self._first_frame = bool(pipe.config.expand_timesteps)  # what is given is a frame at time 0
        self._boundary = (pipe.config.boundary_ratio or 0.0) * pipe.scheduler.config.num_train_timesteps
        self._low = pipe.transformer_2 if pipe.config.boundary_ratio is not None else None
        super().__init__(pipe, *args)

    def usual_side(self) -> tuple[int, int]:
        return int(self.default("width", 832)), int(self.default("height", 480))

    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        frames, fps = int(self.default("num_frames", 81)), FPS_5B if self._first_frame else FPS
        known = self.of_length(facts, defaults, frames=frames, fps=fps)
        return replace(known, pictures=1 if self._first_frame else 0)

    def guidance(self, draw: Draw) -> Guidance:
        if draw.true_cfg is not None:
            raise BadRequest("true_cfg_scale: this model is guided by guidance_scale", param="true_cfg_scale")
        if draw.guidance_2 is not None and self._low is None:
            raise BadRequest("guidance_scale_2: this model has one transformer", param="guidance_scale_2")
        found = super().guidance(draw)
        return found if self._low is None else replace(found, low_scale=draw.guidance_2, boundary=self._boundary)

    def encode(self, text: str) -> Condition:
        from diffusers import WanPipeline  # its sibling for pictures cannot clean a prompt without another package

        states = WanPipeline._get_t5_prompt_embeds(
            self.pipe, prompt=text, device=self.device, max_sequence_length=self.max_text
        )
        return Condition(states[0].to(self.dtype), None, self.text_tokens(self.pipe.tokenizer, text))

    def prepare(self, job: Job) -> None:
        job.key = (job.width, job.height, job.frames, job.seen is None and not job.draw.pictures)
        job.latents = self.film_noise(job, int(self.vae.config.z_dim))[0].to(self.device)
        stepper = copy.copy(self.scheduler)
        stepper.set_timesteps(job.steps, device=self.device)
        stepper.set_begin_index(0)
        job.sigmas = [float(value) for value in stepper.sigmas]
        job.times = [float(value) for value in stepper.timesteps]
        job.stepper = stepper
        if job.draw.pictures:
            job.seen = self.look(job.draw.pictures[0], job)

    def look(self, picture: Pixels, job: Job) -> Seen:
        """What a film begins with: its first frame as latents, alone or at the head of an empty film."""
        frame_CHW = self._resized(picture, job)
        if self._first_frame:
            return Seen(self._compressed(frame_CHW[:, None]))
        return Seen(torch.cat([self._told_frames(job), self._compressed(self._empty_after(frame_CHW, job))]))

    def _resized(self, picture: Pixels, job: Job) -> Tensor:
        found = self.pipe.video_processor.preprocess(image_of(picture), height=job.height, width=job.width)
        return found[0].to(self.device, torch.float32)

    def _compressed(self, film_CFHW: Tensor) -> Tensor:
        config = self.vae.config
        found = self.vae.encode(film_CFHW[None].to(self.vae.dtype)).latent_dist.mode()[0].float()
        mean, deviation = (torch.tensor(values).to(found) for values in (config.latents_mean, config.latents_std))
        return (found - mean[:, None, None, None]) * (1.0 / deviation[:, None, None, None])

    @staticmethod
    def _empty_after(frame_CHW: Tensor, job: Job) -> Tensor:
        empty = frame_CHW.new_zeros(3, job.frames - 1, job.height, job.width)
        return torch.cat([frame_CHW[:, None], empty], 1)

    def _told_frames(self, job: Job) -> Tensor:
        """[temporal, F, H, W]: 1 where a frame is given, each frame of the film apart."""
        assert job.latents is not None
        told = torch.zeros(self._temporal, *job.latents.shape[1:], device=self.device)
        told[:, 0] = 1
        return told

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        """Rows whose time is below the boundary are the second transformer's."""
        low = [at for at, row in enumerate(rows) if self._low is not None and row.time < self._boundary]
        high = [at for at in range(len(rows)) if at not in low]
        found: dict[int, Tensor] = {}
        for model, places in enumerate((high, low)):
            if places:
                found |= zip(places, self._of(model, [rows[at] for at in places]), strict=True)
        return [found[at] for at in range(len(rows))]

    def modulated(self, block: Any, given: dict[str, Any]) -> Tensor:
        """As TeaCache has it for Wan: what the step modulates blocks with."""
        return given["temb"]

    def by_token(self, given: dict[str, Any], part: Callable[[Tensor, int], Tensor], tokens: int) -> dict[str, Any]:
        if given["temb"].ndim == 4:  # a time for each token
            given["temb"] = part(given["temb"], 1)
        return super().by_token(given, part, tokens)

    def transformers(self) -> list[Any]:
        return [self.transformer] if self._low is None else [self.transformer, self._low]

    def _of(self, model: int, rows: Sequence[Row]) -> list[Tensor]:
        embeds = [row.seen.embeds_SE for row in rows if row.seen is not None and row.seen.embeds_SE is not None]
        latents_BCFHW = torch.stack([self._input(row) for row in rows]).to(self.dtype)
        with self.around(rows, model):
            v_BCFHW = self.transformers()[model](
                hidden_states=latents_BCFHW,
                timestep=self._times_of(rows),
                encoder_hidden_states=torch.stack([row.condition.states_SE for row in rows]).to(self.dtype),
                encoder_hidden_states_image=torch.stack(embeds).to(self.dtype) if embeds else None,
                return_dict=False,
            )[0]
        return list(v_BCFHW.float())

    def _input(self, row: Row) -> Tensor:
        if row.seen is None:
            return row.latents
        if self._first_frame:
            return torch.cat([row.seen.latents, row.latents[:, 1:]], 1)
        return torch.cat([row.latents, row.seen.latents])

    def _times_of(self, rows: Sequence[Row]) -> Tensor:
        """One a row; of models that take a first frame one a token, 0 for those of that frame."""
        times_B = self.times(rows)
        if not self._first_frame:
            return times_B
        _, F, H, W = rows[0].latents.shape
        found = times_B[:, None].repeat(1, F * (H // self._patch) * (W // self._patch))
        if rows[0].seen is not None:
            found[:, : (H // self._patch) * (W // self._patch)] = 0
        return found

    def advanced(self, job: Job, v: Tensor) -> tuple[Tensor, Any]:
        stepper = copy.copy(job.stepper)  # the past is in lists that a step changes
        for name, value in vars(stepper).items():
            if isinstance(value, list):
                setattr(stepper, name, list(value))
        time = stepper.timesteps[job.step]
        assert job.latents is not None
        return stepper.step(v[None], time, job.latents[None], return_dict=False)[0][0], stepper

    def finished(self, job: Job, latents: Tensor) -> NDArray[np.uint8]:
        """[frames, height, width, 3]."""
        if self._first_frame and job.seen is not None:
            latents = torch.cat([job.seen.latents, latents[:, 1:]], 1)
        z_CFHW, config = latents.to(self.vae.dtype), self.vae.config
        mean, deviation = (torch.tensor(values).to(z_CFHW) for values in (config.latents_mean, config.latents_std))
        z_CFHW = z_CFHW / (1.0 / deviation[:, None, None, None]) + mean[:, None, None, None]
        return self.shown(self.vae.decode(z_CFHW[None], return_dict=False)[0][0])


PAINTER = Wan
