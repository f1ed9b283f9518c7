"""What families of films have in common: sides and lengths as their VAEs compress them."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from phloem.diffusion.family import Family, as_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.diffusion.request import Facts, Job


class Films(Family):
    """Base, as `Family`: a file in `models/` says what is a family's own."""

    pixels: ClassVar[int] = 16  # sides are multiples of so many: the pipeline refuses all else

    def __init__(self, pipe: Any, *args: Any) -> None:
        self._spatial, self._temporal, self._patch = self.compression(pipe)
        super().__init__(pipe, *args)

    @staticmethod
    def compression(pipe: Any) -> tuple[int, int, int]:
        """(pixels of a latent's side, frames of a latent frame, latents of a token's side)."""
        patch = pipe.transformer.config.patch_size
        patch = patch if isinstance(patch, int) else patch[1]
        return int(pipe.vae_scale_factor_spatial), int(pipe.vae_scale_factor_temporal), int(patch)

    @property
    def grid(self) -> int:
        return lcm(self._spatial * self._patch, self.pixels)

    def tokens(self, width: int, height: int) -> int:
        side = self._spatial * self._patch
        return (width // side) * (height // side)

    def of_length(self, facts: Facts, defaults: dict[str, Any], *, frames: int, fps: float) -> Facts:
        """For `known`. `frames`: of a film whose length nobody asked for; what the server's `defaults` say goes
        before."""
        frames = defaults.get("frames") or frames
        most = defaults.get("max_frames") or 2 * frames - 1
        fps = float(defaults.get("fps") or fps)
        return replace(facts, films=True, frames=frames, frame_grid=self._temporal, max_frames=most, fps=fps)

    def latent_frames(self, job: Job) -> int:
        return (job.frames - 1) // self._temporal + 1

    def film_noise(self, job: Job, channels: int, generator: torch.Generator | None = None) -> Tensor:
        """[1, C, F, H, W] of the job's seed, on the CPU. `generator`: one of it that was drawn from before."""
        generator = generator or torch.Generator("cpu").manual_seed(job.draw.seed)
        sides = job.height // self._spatial, job.width // self._spatial
        return torch.randn((1, channels, self.latent_frames(job), *sides), generator=generator)

    @staticmethod
    def shown(film_CFHW: Tensor) -> NDArray[np.uint8]:
        """[frames, height, width, 3] of what a VAE gives, in -1 to 1."""
        return as_bytes((film_CFHW.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).cpu().numpy())
