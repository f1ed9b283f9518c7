"""What is asked for, what a model takes, and the state of one picture on its way."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.core.messages import Draw

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.diffusion.lora import Worn
    from phloem.diffusion.step_cache import Kept

MAX_STEPS = 1000
MAX_SIDE = 16384  # pixels


@dataclass(frozen=True)
class Facts:
    """What a model takes, as clients are told it.

    `grid`: both sides of a picture are multiples of so many pixels. `negative`: it knows what to stay away from.
    """

    family: str
    grid: int
    width: int
    height: int
    steps: int
    guidance: float | None
    max_pixels: int
    negative: bool = True
    batches: bool = True  # pictures share forward passes
    films: bool = False
    frames: int = 1  # of a film whose length nobody asked for
    frame_grid: int = 1  # a film has one frame more than a multiple of so many
    max_frames: int = 1
    fps: float = 16.0
    pictures: int = 0  # that may come with a request
    needs_pictures: bool = False
    masks: bool = False
    caches: bool = False  # steps may leave blocks out

    def check(self, draw: Draw) -> None:
        """Whether this is what the model makes, of what it takes. Raises BadRequest."""
        if draw.film != self.films:
            what, where = ("films", "/v1/videos") if self.films else ("pictures", "/v1/images/generations")
            raise BadRequest(f"this model makes {what}, and not this: use {where}", param="model", code="wrong_task")
        name, count = "input_reference" if draw.film else "image", len(draw.pictures)
        if count > self.pictures:
            what = f"takes at most {self.pictures} pictures" if self.pictures else "draws from a prompt alone"
            raise BadRequest(f"{name}: this model {what}", param=name, code="not_supported")
        if self.needs_pictures and not count:
            where = "" if draw.film else ": use /v1/images/edits"
            raise BadRequest(f"{name}: this model begins with a picture, which is missing{where}", param=name)
        if draw.step_cache is not None and draw.step_cache.threshold and not self.caches:
            raise BadRequest("cache: this model has no step cache", param="cache", code="not_supported")
        if draw.mask is not None and not self.masks:
            raise BadRequest("mask: this model takes none", param="mask", code="not_supported")

    def length(self, draw: Draw) -> int:
        """Frames. Raises BadRequest."""
        if not self.films:
            return 1
        frames = draw.frames or self.frames
        if not 1 <= frames <= self.max_frames:
            raise BadRequest(f"num_frames: {frames} is not in 1 to {self.max_frames}", param="num_frames")
        if (frames - 1) % self.frame_grid:
            near = min((frames - 1) // self.frame_grid * self.frame_grid + 1, self.max_frames)
            raise BadRequest(
                f"num_frames: {frames} is not one more than a multiple of {self.frame_grid}, such as {near}",
                param="num_frames",
            )
        return frames

    def latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.frame_grid + 1

    def size(self, draw: Draw) -> tuple[int, int]:
        """(width, height) in pixels. Raises BadRequest."""
        width, height = (draw.width, draw.height) if draw.width and draw.height else self._usual_size(draw)
        for side in (width, height):
            if side < 1 or side > MAX_SIDE or side % self.grid:
                if side > MAX_SIDE:
                    raise BadRequest(f"size: {width}x{height}: no side is over {MAX_SIDE}", param="size")
                near = max(self.grid, min(round(side / self.grid), MAX_SIDE // self.grid) * self.grid)
                raise BadRequest(
                    f"size: {width}x{height}: both sides must be multiples of {self.grid}, such as {near}", param="size"
                )
        if width * height > self.max_pixels:
            raise BadRequest(
                f"size: {width}x{height} are {width * height} pixels, this server allows {self.max_pixels}",
                param="size",
            )
        return width, height

    def _usual_size(self, draw: Draw) -> tuple[int, int]:
        """The model's own, in the shape of the picture that came with the request."""
        if not draw.pictures:
            return self.width, self.height
        shape = draw.pictures[-1].width / draw.pictures[-1].height
        area = self.width * self.height
        sides = (area * shape) ** 0.5, (area / shape) ** 0.5
        width, height = (max(self.grid, int(side) // self.grid * self.grid) for side in sides)
        return width, height

    def count(self, draw: Draw) -> int:
        """Steps. Raises BadRequest."""
        steps = self.steps if draw.steps is None else draw.steps
        if not 1 <= steps <= MAX_STEPS:
            raise BadRequest(f"num_inference_steps: {steps} is not in 1 to {MAX_STEPS}", param="num_inference_steps")
        return steps


@dataclass(frozen=True)
class Condition:
    """A text as the model reads it. `states_SE`: one vector a token; `pooled_E`: one of the whole, where it has one."""

    states_SE: Tensor
    pooled_E: Tensor | None = None
    text_tokens: int = 0

    @property
    def nbytes(self) -> int:
        pooled = 0 if self.pooled_E is None else self.pooled_E.nbytes
        return self.states_SE.nbytes + pooled


@dataclass(frozen=True)
class Seen:
    """The pictures of a request, as the model reads them beside its latents.

    `latents`: the VAE's; `shapes`: rows and columns of tokens of each; `embeds_SE`: a vision encoder's.
    """

    latents: Tensor
    shapes: tuple[tuple[int, int], ...] = ()
    embeds_SE: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """How strongly a picture follows its prompt.

    `embedded` is an input of models that were distilled with it. `scale` weighs the prompt against `negative`, which
    is a second row of each step; None: there is no second row. Below the time `boundary` it is `low_scale`.
    """

    embedded: float = 0.0
    scale: float | None = None
    negative: str = ""
    low_scale: float | None = None
    boundary: float = 0.0

    def at(self, time: float) -> float | None:
        return self.low_scale if self.low_scale is not None and time < self.boundary else self.scale


class Stage(enum.Enum):
    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    WHOLE = "whole"  # by a pipeline that owns its loop


@dataclass(eq=False)
class Job:
    """One picture. `step` of `steps` are done; `tokens` are those of its latents, in all its rows."""

    draw: Draw
    number: int  # in the order of arrival
    width: int
    height: int
    steps: int
    guidance: Guidance
    tokens: int
    stage: Stage = Stage.ENCODE
    step: int = 0
    alone: bool = False  # a step with others has failed
    key: Any = None  # jobs of one key may share a step
    previews: dict[int, int] = field(default_factory=dict)  # after so many steps -> its index
    frames: int = 1
    conditions: list[Condition] = field(default_factory=list)
    seen: Seen | None = None
    latents: Tensor | None = None
    kept: list[tuple[Kept, ...]] = field(default_factory=list)  # by step caches, for each row
    worn: Worn = ()  # adapters
    stepper: Any = None  # a scheduler of diffusers that knows this job's past, of families whose steps have one
    sigmas: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    arrived: float = field(default_factory=monotonic)
    begun: float = 0.0
    served: float = 0.0  # what its client has had, where clients share the machine out

    @property
    def id(self) -> str:
        return self.draw.id

    @property
    def left(self) -> int:
        """Latent tokens that are still to be computed."""
        return self.tokens * (self.steps - self.step)


def preview_steps(steps: int, count: int) -> dict[int, int]:
    """After which steps a preview is shown, evenly spread and never after the last: steps done -> index from 0."""
    found: dict[int, int] = {}
    for index in range(count):
        at = -(-steps * (index + 1) // (count + 1))
        if 0 < at < steps and at not in found:
            found[at] = len(found)
    return found
