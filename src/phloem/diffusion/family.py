"""What the models of one family have in common: flow matching, by Euler steps that are ours.

v = model(x, t), x <- x + (s[i+1] - s[i]) v in float32, from noise at s = 1 down to s = 0; the picture that a step
points at is x - s v. Models, VAEs, encoders and the shape of the schedule come from diffusers; the loop does not.

Names carry shapes: `L` tokens of latents, `C` channels, `H`, `W` sides, `S` tokens of a text, `E` their width.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from phloem.core.errors import BadRequest, PhloemError
from phloem.diffusion.parts import PICTURES, TEXT, Parts
from phloem.diffusion.request import Condition, Facts, Guidance, Seen
from phloem.diffusion.step_cache import PLAIN, STATES, Kept, StepCache
from phloem.diffusion.worn import Wearing

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.caching import StepCaching
    from phloem.core.messages import Draw, Pixels
    from phloem.diffusion.lora import Worn
    from phloem.diffusion.request import Job

NO_NUMBERS = "the model gave no numbers (NaN or infinity) for this picture"
MOST_SCHEDULES = 256  # that are kept: there is one for each number of steps and size that clients ask for
ROTARY = ("image_rotary_emb", "rotary_emb", "freqs_cis")  # a block's rotations, by place
TIMES = 1000.0  # of the schedules: the time of pure noise


@dataclass(frozen=True)
class Row:
    """A row of one forward pass: latents without a batch axis, at its own time (1000 is noise, 0 the picture)."""

    latents: Tensor
    time: float
    condition: Condition
    embedded: float
    width: int
    height: int
    seen: Seen | None = None
    kept: tuple[Kept, ...] = ()  # by its step cache, for each transformer
    worn: Worn = ()  # adapters
    last: bool = False  # step of its picture
    fps: float = 0.0  # of a film, where a client has said it


class Family:
    """Base: one file in `models/` says what is a family's own.

    Args:
        pipe: a diffusers pipeline; its parts are used, its loop never is.
        defaults: what the server's operator has set (`image_defaults`).
        offload: parts are on the device while they are used alone.
    """

    mixed_sizes: ClassVar[bool] = False  # rows of different sizes in one forward pass
    block_lists: ClassVar[tuple[str, ...]] = ()  # of the transformer, where a step cache may stand between them
    states: ClassVar[str] = STATES  # the argument of these blocks that is their latents' states
    states_first: ClassVar[bool] = False  # they give these before the texts
    teacache: ClassVar[tuple[float, ...]] = PLAIN  # its polynomial, the highest power first
    sequences: ClassVar[tuple[str, ...]] = ()  # lists of blocks over which ranks may share tokens out, in their order
    attentions: ClassVar[tuple[str, ...]] = ("attn",)  # in a block, those that see all tokens of the latents
    joint_texts: ClassVar[bool] = True  # they see texts beside these, which stand first or last
    texts_first: ClassVar[bool] = True
    reads_pictures: ClassVar[bool] = False  # the text's encoder sees the pictures that came with it
    schedulers: ClassVar[tuple[str, ...]] = ("FlowMatchEulerDiscreteScheduler",)

    def __init__(
        self, pipe: Any, device: torch.device, dtype: torch.dtype, defaults: dict[str, Any], offload: bool = False
    ) -> None:
        self.pipe, self.device, self.dtype = pipe, device, dtype
        self.transformer, self.vae, self.scheduler = pipe.transformer, pipe.vae, pipe.scheduler
        self._call = inspect.signature(pipe.__call__).parameters
        self.max_text = int(self.default("max_sequence_length", 512))
        self.wearing = Wearing(self.transformer, device, dtype)
        self.parts = Parts(pipe.components, device, offload)
        self.step_caches: list[StepCache] = []  # one for each transformer, once anybody asks
        self._schedules: dict[tuple[int, int], tuple[list[float], list[float]]] = {}
        name = type(self).__module__.rsplit(".", 1)[-1]
        facts = facts_of(name, self.grid, self.usual_side(), self._call, defaults)
        self.facts = self.known(replace(facts, caches=bool(self.block_lists)), defaults)

    # --- what a family may say

    @property
    def grid(self) -> int:
        """Pixels of the side of one token."""
        return int(self.pipe.vae_scale_factor) * 2

    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        """With what is this family's own."""
        return facts

    def usual_side(self) -> int | tuple[int, int]:
        """Pixels of the side of a picture whose size nobody asked for, or of its width and height."""
        return int(self.pipe.default_sample_size) * int(self.pipe.vae_scale_factor)

    def guidance(self, draw: Draw) -> Guidance:
        """Raises BadRequest."""
        scale = self.facts.guidance if draw.guidance is None else draw.guidance
        return Guidance(scale=scale if scale is not None and scale > 1 else None, negative=draw.negative or "")

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return negative + scale * (positive - negative)

    def encode(self, text: str) -> Condition:
        raise NotImplementedError

    def encode_seeing(self, text: str, pictures: Sequence[Pixels]) -> Condition:
        """Of families whose text encoder sees."""
        raise NotImplementedError

    def condition_of(self, text: str, pictures: Sequence[Pixels] = ()) -> Condition:
        """What the text encoders make of a prompt, and of the pictures that they see."""
        self.parts.use(TEXT)
        return self.encode_seeing(text, pictures) if pictures else self.encode(text)

    def prepared(self, job: Job) -> None:
        if job.draw.pictures:
            self.parts.use(PICTURES)
        self.prepare(job)

    def drawn(self, job: Job, latents: Tensor) -> NDArray[np.uint8]:
        """As `finished`."""
        self.parts.use(PICTURES)
        return self.finished(job, latents)

    def glimpse(self, job: Job, latents: Tensor) -> NDArray[np.uint8]:
        """Pixels [height, width, 3] of a picture on its way."""
        self.parts.use(PICTURES)
        return self.decode(latents, job.width, job.height)

    def transformers(self) -> list[Any]:
        return [self.transformer]

    def modulated(self, block: Any, given: dict[str, Any]) -> Tensor:
        """What TeaCache compares: the first block's input as the step modulates it, a row for each."""
        raise NotImplementedError

    @property
    def heads(self) -> int:
        """Of the attentions that ranks may share out."""
        return int(self.transformer.config.num_attention_heads)

    def by_token(self, given: dict[str, Any], part: Callable[[Tensor, int], Tensor], tokens: int) -> dict[str, Any]:
        """A block's arguments with `part` taken of those that have a place for each of the `tokens`, in a dimension."""
        for name in ROTARY:
            found = given.get(name)
            if isinstance(found, tuple):
                given[name] = tuple(part(one, int(one.ndim > 2)) for one in found)
            elif found is not None:
                given[name] = part(found, int(found.ndim > 2))
        return given

    def cache_steps(self, job: Job, rule: StepCaching) -> None:
        """Let a job's rows keep what their blocks add. Raises BadRequest."""
        self.check_cache(rule)
        job.kept = [tuple(Kept(rule) for _ in self.step_caches) for _ in job.conditions]

    def check_cache(self, rule: StepCaching) -> None:
        """Whether there are blocks for it to leave out. Raises BadRequest."""
        if not self.step_caches:
            self.step_caches = [
                StepCache(model, self.block_lists, self.modulated, self.teacache, self.states, self.states_first)
                for model in self.transformers()
            ]
        for cache in self.step_caches:
            cache.check(rule)

    @contextlib.contextmanager
    def around(self, rows: Sequence[Row], model: int = 0) -> Generator[None]:
        """Around the call of a transformer: step caches, and adapters, which are the first transformer's."""
        self.parts.use("transformer" if model == 0 else f"transformer_{model + 1}")
        with contextlib.ExitStack() as stack:
            if any(row.kept for row in rows):
                stack.enter_context(self.step_caches[model].rows(rows, model))
            if model == 0:
                stack.enter_context(self.wearing.rows(rows))
            yield

    def apart(self, job: Job) -> None:
        """Pictures that wear different adapters share no step where the rows of layers are not those of the step: of
        sizes in lists, and where a cache leaves rows out."""
        if self.mixed_sizes or job.kept:
            job.key = (job.key, job.worn)

    def prepare(self, job: Job) -> None:
        """What a job needs for its first step, beside its conditions."""
        job.key = self.key(job.width, job.height, job.conditions)
        job.latents = self.seeded(job.width, job.height, job.draw.seed)
        job.sigmas, job.times = self.schedule(job.steps, self.tokens(job.width, job.height))
        if job.draw.pictures:
            job.seen = self.seen(job.draw.pictures)
            job.key = (job.key, job.seen.shapes)

    def seen(self, pictures: Sequence[Pixels]) -> Seen:
        """Of families that take pictures."""
        raise NotImplementedError

    def compressed(self, picture_1CHW: Tensor) -> Tensor:
        """[C, H, W] latents of a picture in -1 to 1, as the model reads them: what `to_pixels` undoes."""
        config = self.vae.config
        z_CHW = self.vae.encode(picture_1CHW.to(self.device, self.vae.dtype)).latent_dist.mode()[0].float()
        return (z_CHW - (config.shift_factor or 0.0)) * config.scaling_factor

    def advanced(self, job: Job, v: Tensor) -> tuple[Tensor, Any]:
        """(latents, stepper) after this step; the job is left as it is."""
        assert job.latents is not None
        return job.latents + (job.sigmas[job.step + 1] - job.sigmas[job.step]) * v, None

    def finished(self, job: Job, latents: Tensor) -> NDArray[np.uint8]:
        """Pixels [height, width, 3], or of a film [frames, height, width, 3]."""
        return self.decode(latents, job.width, job.height)

    def noise(self, width: int, height: int, generator: torch.Generator) -> Tensor:
        """Latents of one picture, float32, on the CPU."""
        raise NotImplementedError

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        """v of each row, float32. Raises what the model raises."""
        raise NotImplementedError

    def latents_CHW(self, latents: Tensor, width: int, height: int) -> Tensor:
        """As the VAE reads them, before its own scale."""
        return latents

    def schedule(self, steps: int, tokens: int) -> tuple[list[float], list[float]]:
        """(sigmas, one more than steps; times), descending. `tokens` of the picture shift them where the model says."""
        key = (steps, tokens)
        if key not in self._schedules:
            if len(self._schedules) >= MOST_SCHEDULES:
                self._schedules.clear()
            self._set_schedule(steps, tokens)
            sigmas = [float(value) for value in self.scheduler.sigmas]
            self._schedules[key] = (sigmas, [float(value) for value in self.scheduler.timesteps])
        return self._schedules[key]

    def _set_schedule(self, steps: int, tokens: int) -> None:
        if self.scheduler.config.get("use_flow_sigmas"):
            self.scheduler.set_timesteps(steps, mu=self.shift(tokens))
            return
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=self.shift(tokens))

    # --- what all have

    def default(self, name: str, otherwise: Any) -> Any:
        return default_of(self._call, name, otherwise)

    def key(self, width: int, height: int, conditions: Sequence[Condition]) -> Any:
        """Pictures of one key may share a forward pass."""
        return () if self.mixed_sizes else (width, height)

    def tokens(self, width: int, height: int) -> int:
        return (width // self.grid) * (height // self.grid)

    def shift(self, tokens: int, most: float = 1.15) -> float:
        """mu: linear in the tokens of the picture, through the two points that the schedule's config names."""
        config = self.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        first, last = config.get("base_shift", 0.5), config.get("max_shift", most)
        return first + (last - first) / (high - low) * (tokens - low)

    def seeded(self, width: int, height: int, seed: int) -> Tensor:
        """Noise that depends on the seed and the size alone: drawn on the CPU whatever the device and the batch."""
        return self.noise(width, height, torch.Generator("cpu").manual_seed(seed)).to(self.device)

    def decode(self, latents: Tensor, width: int, height: int) -> NDArray[np.uint8]:
        """Pixels [height, width, 3]."""
        z_CHW = self.latents_CHW(latents, width, height).to(self.vae.dtype)
        pixels_CHW = self.to_pixels(z_CHW).float()
        return as_bytes((pixels_CHW / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy())

    def to_pixels(self, z_CHW: Tensor) -> Tensor:
        """[3, height, width] in -1 to 1."""
        config = self.vae.config
        z_CHW = z_CHW / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(z_CHW[None], return_dict=False)[0][0]

    def text_tokens(self, tokenizer: Any, text: str) -> int:
        return len(tokenizer(text).input_ids) if tokenizer is not None else 0

    def stack(self, rows: Sequence[Row]) -> Tensor:
        return torch.stack([row.latents for row in rows]).to(self.dtype)

    def times(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.time for row in rows], dtype=torch.float32, device=self.device)


def rows_of(job: Job) -> list[Row]:
    """The prompt's row, and the negative one where the picture is guided by two."""
    assert job.latents is not None
    return [
        Row(
            job.latents,
            job.times[job.step],
            condition,
            job.guidance.embedded,
            job.width,
            job.height,
            job.seen,
            kept,
            job.worn,
            job.step + 1 == job.steps,
            job.draw.fps,
        )
        for condition, kept in zip(job.conditions, job.kept or [()] * len(job.conditions), strict=True)
    ]


def as_bytes(pixels_HWC: NDArray[np.float32]) -> NDArray[np.uint8]:
    """From 0 to 1. Raises PhloemError where they are no numbers: NaN would be some grey."""
    if not np.isfinite(pixels_HWC).all():
        raise PhloemError(NO_NUMBERS)
    return (pixels_HWC * 255).round().astype(np.uint8)


def image_of(picture: Pixels) -> Any:
    """As Pillow has it."""
    from PIL import Image  # diffusers needs it as well

    return Image.frombytes("RGB", (picture.width, picture.height), picture.data)


def default_of(call: Any, name: str, otherwise: Any) -> Any:
    """What the pipeline takes where nobody says anything."""
    found = call[name].default if name in call else None
    return otherwise if found is None or found is inspect.Parameter.empty else found


def facts_of(
    name: str, grid: int, side: int | tuple[int, int], call: Any, defaults: dict[str, Any], batches: bool = True
) -> Facts:
    """A model's facts: the operator's, else the pipeline's own."""
    width, height = defaults.get("size") or (side if isinstance(side, tuple) else (side, side))
    guidance = defaults.get("guidance_scale", default_of(call, "guidance_scale", None))
    return Facts(
        family=name,
        grid=grid,
        width=width,
        height=height,
        steps=defaults.get("steps") or int(default_of(call, "num_inference_steps", 50)),
        guidance=None if guidance is None else float(guidance),
        max_pixels=defaults.get("max_pixels") or 4 * width * height,
        negative="negative_prompt" in call,
        batches=batches,
    )


def packed(latents_CHW: Tensor) -> Tensor:
    """[C, H, W] -> [L, 4 C]: tokens of 2 x 2, the channels of each outermost."""
    C, H, W = latents_CHW.shape
    blocks = latents_CHW.reshape(C, H // 2, 2, W // 2, 2)
    return blocks.permute(1, 3, 0, 2, 4).reshape(H // 2 * (W // 2), C * 4)


def unpacked(latents_LC: Tensor, rows: int, columns: int) -> Tensor:
    """[L, 4 C] -> [C, 2 rows, 2 columns]."""
    C = latents_LC.shape[1] // 4
    blocks = latents_LC.reshape(rows, columns, C, 2, 2)
    return blocks.permute(2, 0, 3, 1, 4).reshape(C, rows * 2, columns * 2)


def beside(rows: Sequence[Row], latents_BLC: Tensor) -> Tensor:
    """The pictures of each row behind its latents; all rows have as many tokens of them."""
    seen = [row.seen.latents for row in rows if row.seen is not None]
    return torch.cat([latents_BLC, torch.stack(seen).to(latents_BLC)], 1) if seen else latents_BLC


def negative_by_scale(draw: Draw, name: str, usual: float | None) -> Guidance:
    """Of models whose true guidance is asked for by `true_cfg_scale` and a negative prompt. Raises BadRequest."""
    scale = usual if draw.true_cfg is None else draw.true_cfg
    if draw.negative is None and draw.true_cfg is not None and draw.true_cfg > 1 and usual is None:
        raise BadRequest("true_cfg_scale: it weighs a prompt against negative_prompt, which is missing", param=name)
    if draw.negative is not None and (scale is None or scale <= 1):
        raise BadRequest(
            "negative_prompt: this model reads one where true_cfg_scale is above 1", param="true_cfg_scale"
        )
    return Guidance(scale=scale if scale is not None and scale > 1 else None, negative=draw.negative or "")
