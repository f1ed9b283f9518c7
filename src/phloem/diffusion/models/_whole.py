"""Any other pipeline of diffusers: run whole, one picture or film at a time, with progress, ended between steps."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core.errors import BadRequest, ModelLoadError, PhloemError
from phloem.diffusion.family import as_bytes, default_of, facts_of, image_of
from phloem.diffusion.request import Guidance

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from phloem.core.messages import Draw, Pixels
    from phloem.diffusion.request import Facts, Job


class Cancelled(Exception):
    """Whoever asked for the picture wants it no more."""


class Whole:
    """Args: a pipeline with `prompt` in and `images` out, and what the server's operator has set."""

    def __init__(self, pipe: Any, defaults: dict[str, Any]) -> None:
        self.pipe = pipe
        self._call = inspect.signature(pipe.__call__).parameters
        self._check()
        factor = self._said("vae_scale_factor", "vae_scale_factor_spatial") or 8
        if "num_frames" in self._call:  # films are cut into patches of latents
            factor = self._said("vae_spatial_compression_ratio") or 2 * factor
        facts = facts_of("whole", factor, self._sides(factor), self._call, defaults, batches=False)
        shown = "image" in self._call
        facts = replace(facts, pictures=int(shown), needs_pictures=shown, masks="mask_image" in self._call)
        self.facts = self._films(facts, defaults) if "num_frames" in self._call else facts

    def _films(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        usual = int(default_of(self._call, "num_frames", 16))
        for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
            grid = self._said(name)
            if grid is not None and (usual - 1) % grid == 0:
                facts = replace(facts, frame_grid=grid)
        rate = default_of(self._call, "frame_rate", default_of(self._call, "fps", 16))
        frames = defaults.get("frames") or usual
        most, rate = defaults.get("max_frames") or 2 * frames - 1, defaults.get("fps") or rate
        return replace(facts, films=True, frames=frames, max_frames=most, fps=float(rate))

    def _said(self, *names: str) -> int | None:
        """The first of these that the pipeline knows a number for."""
        found = [getattr(self.pipe, name, None) for name in names]
        return next((value for value in found if isinstance(value, int)), None)

    def _check(self) -> None:
        """Raises ModelLoadError for what does not make one picture or film of one prompt, and at most one picture."""
        name = type(self.pipe).__name__
        free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        needed = [one.name for one in self._call.values() if one.default is one.empty and one.kind not in free]
        if "prompt" not in self._call or set(needed) - {"prompt", "image", "mask_image"}:
            raise ModelLoadError(
                f"{name} draws from {', '.join(needed) or 'nothing'}: only prompts and pictures are served"
            )

    def _sides(self, factor: int) -> int | tuple[int, int]:
        width, height = (default_of(self._call, name, None) for name in ("width", "height"))
        if isinstance(width, int) and isinstance(height, int):
            return width, height
        sample = getattr(self.pipe, "default_sample_size", None)
        if sample is None:
            inner = getattr(self.pipe, "unet", None) or getattr(self.pipe, "transformer", None)
            sample = getattr(getattr(inner, "config", None), "sample_size", None)
        return int(sample) * factor if isinstance(sample, int) else 512

    def guidance(self, draw: Draw) -> Guidance:
        """What the pipeline is given. Raises BadRequest for what it does not take."""
        for field, name, value in (
            ("prompt", "prompt", draw.prompt),
            ("negative_prompt", "negative_prompt", draw.negative),
            ("guidance_scale", "guidance_scale", draw.guidance),
            ("guidance_scale_2", "guidance_scale_2", draw.guidance_2),
            ("true_cfg_scale", "true_cfg_scale", draw.true_cfg),
        ):
            if value is not None and name not in self._call:
                raise BadRequest(f"{field}: {type(self.pipe).__name__} takes none", param=field)
        return Guidance()

    def tokens(self, width: int, height: int) -> int:
        return (width // self.facts.grid) * (height // self.facts.grid)

    def draw(self, job: Job, on_step: Callable[[int], bool]) -> NDArray[np.uint8]:
        """Pixels [height, width, 3], or of a film [frames, height, width, 3].

        Args:
            on_step: told how many steps are done; False ends the picture.

        Raises:
            Cancelled: as `on_step` said.
        """
        given = {
            "prompt": job.draw.prompt,
            "negative_prompt": job.draw.negative,
            "width": job.width,
            "height": job.height,
            "num_inference_steps": job.steps,
            "guidance_scale": job.draw.guidance if job.draw.guidance is not None else self.facts.guidance,
            "guidance_scale_2": job.draw.guidance_2,
            "true_cfg_scale": job.draw.true_cfg,
            "num_frames": job.frames if self.facts.films else None,
            "frame_rate": job.draw.fps or self.facts.fps,
            "image": self._shown(job.draw.pictures[0], job) if job.draw.pictures else None,
            "mask_image": self._shown(job.draw.mask, job) if job.draw.mask is not None else None,
            "generator": torch.Generator("cpu").manual_seed(job.draw.seed),
            "output_type": "np",
            "callback_on_step_end": self._callback(on_step),
        }
        taken = {name: value for name, value in given.items() if name in self._call and value is not None}
        try:
            found: Any = self.pipe(**taken)
        except ValueError as error:
            if job.step:
                raise
            raise BadRequest(f"{type(self.pipe).__name__} refuses this: {error!s:.300}") from error
        name = "frames" if self.facts.films else "images"
        made = getattr(found, name, None)
        if made is None:
            raise PhloemError(f"{type(self.pipe).__name__} gave no pictures: it is for something else")
        return as_bytes(np.asarray(made[0])[..., :3])

    def _shown(self, picture: Pixels, job: Job) -> Any:
        """As large as what is drawn, for pipelines that go by the size of what they are given."""
        image = image_of(picture)
        return image if "width" in self._call else image.resize((job.width, job.height))

    def _callback(self, on_step: Callable[[int], bool]) -> Callable[..., dict[str, Any]]:
        def told(pipe: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if not on_step(step + 1):
                raise Cancelled
            return kept

        return told
