"""Any other pipeline of diffusers: run whole, one picture at a time, with its progress, and ended between steps."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core.errors import BadRequest, ModelLoadError, PhloemError
from phloem.diffusion.family import as_bytes, default_of, facts_of
from phloem.diffusion.request import Guidance

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from phloem.core.messages import Draw
    from phloem.diffusion.request import Job


class Cancelled(Exception):
    """Whoever asked for the picture wants it no more."""


class Whole:
    """Args: a pipeline with `prompt` in and `images` out, and what the server's operator has set."""

    def __init__(self, pipe: Any, defaults: dict[str, Any]) -> None:
        self.pipe = pipe
        self._call = inspect.signature(pipe.__call__).parameters
        self._check()
        factor = int(getattr(pipe, "vae_scale_factor", 8))
        side = self._side(factor)
        self.facts = facts_of("whole", factor, side, self._call, defaults, batches=False)

    def _check(self) -> None:
        """Raises ModelLoadError for what does not make one picture of one prompt."""
        name = type(self.pipe).__name__
        if "num_frames" in self._call:
            raise ModelLoadError(f"{name} makes films, which are not served")
        free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        needed = [one.name for one in self._call.values() if one.default is one.empty and one.kind not in free]
        if "prompt" not in self._call or set(needed) - {"prompt"}:
            raise ModelLoadError(f"{name} draws from {', '.join(needed) or 'nothing'}: only prompts are served")

    def _side(self, factor: int) -> int:
        for name in ("height", "width"):
            usual = default_of(self._call, name, None)
            if isinstance(usual, int):
                return usual
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
            ("true_cfg_scale", "true_cfg_scale", draw.true_cfg),
        ):
            if value is not None and name not in self._call:
                raise BadRequest(f"{field}: {type(self.pipe).__name__} takes none", param=field)
        return Guidance()

    def tokens(self, width: int, height: int) -> int:
        return (width // self.facts.grid) * (height // self.facts.grid)

    def draw(self, job: Job, on_step: Callable[[int], bool]) -> NDArray[np.uint8]:
        """Pixels [height, width, 3].

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
            "true_cfg_scale": job.draw.true_cfg,
            "generator": torch.Generator("cpu").manual_seed(job.draw.seed),
            "output_type": "np",
            "callback_on_step_end": self._callback(on_step),
        }
        taken = {name: value for name, value in given.items() if name in self._call and value is not None}
        found: Any = self.pipe(**taken)
        images = getattr(found, "images", None)
        if images is None:
            raise PhloemError(f"{type(self.pipe).__name__} gave no pictures: it is for something else")
        return as_bytes(np.asarray(images[0])[..., :3])

    def _callback(self, on_step: Callable[[int], bool]) -> Callable[..., dict[str, Any]]:
        def told(pipe: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if not on_step(step + 1):
                raise Cancelled
            return kept

        return told
