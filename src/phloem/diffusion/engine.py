"""The engine of pictures: one thread that encodes, denoises and decodes, an item at a time, and takes news between.

A picture is in exactly one of `jobs`' stages until it is answered, once: done, failed, or aborted and not answered. A
step that fails never happened: latents move only when every row of it has its result. Of a step that failed for all its
rows each is tried alone, so that what is wrong with one ends that one; for lack of memory, the budget is halved too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.caching import NONE, StepCaching
from phloem.core.errors import BadRequest, OutOfMemory, PhloemError, QueueFull
from phloem.core.messages import Draw, FromEngine, Painted, Stats
from phloem.diffusion.conditions import Conditions
from phloem.diffusion.family import NO_NUMBERS, Family, rows_of
from phloem.diffusion.models._whole import Cancelled, Whole
from phloem.diffusion.queue import Item, Shares, next_item
from phloem.diffusion.request import Condition, Job, Stage, preview_steps
from phloem.engine.memory import is_out_of_memory
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.messages import Pixels
    from phloem.diffusion.lora import Worn
    from phloem.diffusion.models import Painter
    from phloem.diffusion.twin import Company
    from phloem.diffusion.worn import Wardrobe

_log = log.get("diffusion")


@dataclass(frozen=True)
class Settings:
    """`budget`: latent tokens of a step; `most`: pictures past their encoding; `alone`: each step has one picture."""

    budget: int
    policy: str = "fcfs"
    most: int = 64
    most_waiting: int = 4096
    alone: bool = False
    step_cache: StepCaching = NONE  # where requests say nothing


class Studio:
    """Args: who draws, how, where answers go, and what gives a device's unused memory back."""

    def __init__(
        self,
        painter: Painter,
        settings: Settings,
        send: Callable[[FromEngine], None],
        empty_cache: Callable[[], None] = lambda: None,
    ) -> None:
        self.painter, self.settings, self.budget = painter, settings, settings.budget
        self.jobs: dict[str, Job] = {}
        self.steps = 0  # forward passes since the start
        self.out_of_memory = 0
        self.conditions = Conditions(self._encoded)
        self.wardrobe: Wardrobe | None = None  # of families that take adapters
        self.beside: Company | None = None  # who computes rows of negative prompts, or parts of all
        self._send, self._empty_cache = send, empty_cache
        self._number, self._shares = 0, Shares()
        self._step_seconds: list[float] = []
        self._pixels, self._since = 0, monotonic()

    # --- news

    def submit(self, draw: Draw) -> None:
        """Take a picture up, or answer why not."""
        try:
            # Those in work do not wait; a pipeline that runs whole works on one.
            waiting = len(self.jobs) - (1 if isinstance(self.painter, Whole) else self.settings.most)
            if waiting >= self.settings.most_waiting:
                what = "films" if self.painter.facts.films else "pictures"
                raise QueueFull(f"{waiting} {what} are waiting, the server takes no more")
            job = self.jobs[draw.id] = self._admitted(draw)
        except PhloemError as error:
            self._fail(draw.id, error)
            return
        if draw.film:
            self._send(Painted(id=draw.id, steps=job.steps, width=job.width, height=job.height, frames=job.frames))

    def abort(self, key: str, everything: bool = False) -> None:
        """Forget a picture; nothing is answered, and no other is touched."""
        if everything:
            self.jobs.clear()
        self.jobs.pop(key, None)

    def _admitted(self, draw: Draw) -> Job:
        painter, facts = self.painter, self.painter.facts
        facts.check(draw)
        width, height = facts.size(draw)
        steps, frames, guidance = facts.count(draw), facts.length(draw), painter.guidance(draw)
        worn = self._worn(draw)
        self._number += 1
        rows = 1 if guidance.scale is None else 2
        return Job(
            draw,
            self._number,
            width,
            height,
            steps,
            guidance,
            tokens=painter.tokens(width, height) * facts.latent_frames(frames) * rows,
            stage=Stage.WHOLE if isinstance(painter, Whole) else Stage.ENCODE,
            alone=self.settings.alone,
            previews=preview_steps(steps, draw.previews),
            frames=frames,
            worn=worn,
        )

    def _worn(self, draw: Draw) -> Worn:
        if self.wardrobe is not None:
            return self.wardrobe.worn(draw.lora)
        if draw.lora:
            raise BadRequest("lora: this model takes no adapters", param="lora", code="not_supported")
        return ()

    # --- work

    def step(self, between: Callable[[], None] | None = None) -> bool:
        """Do one item; False when there is none. `between` takes news while a pipeline of others runs whole."""
        jobs = list(self.jobs.values())
        self._shares.rank(jobs)
        item = next_item(jobs, self.budget, self.settings.policy, self.settings.most)
        if item is None:
            return False
        self._shares.charge(item)
        for job in item.jobs:
            job.begun = job.begun or monotonic()
        try:
            with torch.inference_mode():
                self._do(item, between)
        except Cancelled:
            pass
        except Exception as error:
            self._failed(item, error)
        return True

    def _do(self, item: Item, between: Callable[[], None] | None) -> None:
        first, painter = item.jobs[0], self.painter
        if isinstance(painter, Whole):
            self._whole(first, painter, between)
        elif item.stage is Stage.ENCODE:
            self._encode(first, painter)
        elif item.stage is Stage.DENOISE:
            self._denoise(item.jobs, painter)
        else:
            latents = first.latents
            assert latents is not None
            if not bool(torch.isfinite(latents).all()):
                raise PhloemError(NO_NUMBERS)
            self._finish(first, painter.drawn(first, latents))

    def _encoded(self, text: str, pictures: Sequence[Pixels]) -> Condition:
        assert isinstance(self.painter, Family)
        return self.painter.condition_of(text, pictures)

    def _encode(self, job: Job, painter: Family) -> None:
        guidance = job.guidance
        texts = [job.draw.prompt, *([] if guidance.scale is None else [guidance.negative])]
        shown = job.draw.pictures if painter.reads_pictures else []
        job.conditions = [self.conditions.of(text, shown) for text in texts]
        painter.prepared(job)
        rule = self.settings.step_cache if job.draw.step_cache is None else job.draw.step_cache
        if rule.threshold > 0:
            painter.cache_steps(job, rule)
        if self.beside is not None:
            self.beside.take(job, rule)
        painter.apart(job)
        if job.seen is not None and job.seen.shapes:  # tokens beside its own
            job.tokens += len(job.conditions) * job.seen.latents.shape[0]
        job.stage = Stage.DENOISE

    def _denoise(self, jobs: list[Job], painter: Family) -> None:
        begun = perf_counter()
        rows = [row for job in jobs for row in rows_of(job)]
        if self.beside is None:
            found = iter(painter.forward(rows))
        else:
            found = iter(self.beside.forward(rows, [at > 0 for job in jobs for at in range(len(job.conditions))]))
        moved: list[tuple[Job, Tensor, Any, Tensor]] = []
        for job in jobs:
            v, scale = next(found), job.guidance.at(job.times[job.step])
            if job.guidance.scale is not None and scale is not None:
                v = painter.guide(v, next(found), scale)
            moved.append((job, *painter.advanced(job, v), v))
        self.steps += 1
        self._step_seconds.append(perf_counter() - begun)
        for job, latents, stepper, v in moved:
            job.step, job.latents, job.stepper = job.step + 1, latents, stepper
            if job.step == job.steps:
                job.stage = Stage.DECODE
            self._tell(job, painter, latents, v)

    def _tell(self, job: Job, painter: Family, latents: Tensor, v: Tensor) -> None:
        """How far it is, with a preview where one is due: the picture that this step points at."""
        told = Painted(id=job.id, step=job.step, steps=job.steps)
        index = job.previews.get(job.step)
        if index is not None:
            ahead = latents - job.sigmas[job.step] * v
            if bool(torch.isfinite(ahead).all()):  # else the picture will fail at its end, and says so
                _show(told, painter.glimpse(job, ahead), index)
        self._send(told)

    def _whole(self, job: Job, painter: Whole, between: Callable[[], None] | None) -> None:
        last = perf_counter()

        def on_step(done: int) -> bool:
            nonlocal last
            now = perf_counter()
            self._step_seconds.append(now - last)
            last, job.step = now, min(done, job.steps)
            self.steps += 1
            self._send(Painted(id=job.id, step=job.step, steps=job.steps))
            if between is not None:
                between()
            return job.id in self.jobs

        pixels = painter.draw(job, on_step)
        if job.id in self.jobs:
            self._finish(job, pixels)

    # --- ends

    def _finish(self, job: Job, pixels: NDArray[np.uint8]) -> None:
        told = Painted(
            id=job.id,
            step=job.steps,
            steps=job.steps,
            done=True,
            queue_seconds=job.begun - job.arrived,
            text_tokens=job.conditions[0].text_tokens if job.conditions else 0,
            image_tokens=self.painter.tokens(job.width, job.height) * self.painter.facts.latent_frames(job.frames),
            seen_tokens=job.seen.latents.shape[0] if job.seen is not None and job.seen.shapes else 0,
        )
        if pixels.ndim == 4:
            told.frames, told.height, told.width = pixels.shape[:3]
            for at in range(told.frames):
                piece = Painted(id=job.id, step=job.steps, steps=job.steps, frame=at, frames=told.frames)
                _show(piece, pixels[at])
                self._send(piece)
        else:
            _show(told, pixels)
        self._pixels += told.width * told.height * max(1, told.frames)
        del self.jobs[job.id]
        self._send(told)

    def _failed(self, item: Item, error: Exception) -> None:
        memory = is_out_of_memory(error)
        if memory:
            self.out_of_memory += 1
            self._empty_cache()
        if len(item.jobs) > 1:
            _log.warning("a step of %d pictures failed, each is tried alone: %s", len(item.jobs), error)
            if memory:
                self.budget = max(1, min(self.budget, sum(job.tokens for job in item.jobs)) // 2)
                return
            for job in item.jobs:
                job.alone = True
            return
        job = item.jobs[0]
        self.jobs.pop(job.id, None)
        if memory:
            what = f"a film of {job.frames} frames" if job.draw.film else "a picture"
            error = OutOfMemory(f"{what} of {job.width}x{job.height} needs more memory than there is")
        elif not isinstance(error, PhloemError):
            _log.error("picture %s failed at %s", job.id, item.stage.value, exc_info=error)
            error = PhloemError(f"the picture failed at {item.stage.value}: {type(error).__name__}: {error!s:.300}")
        self._fail(job.id, error)

    def _fail(self, key: str, error: PhloemError) -> None:
        param, code = (error.param, error.code) if isinstance(error, BadRequest) else (None, None)
        self._send(Painted(id=key, done=True, error=error.message, status=error.status, param=param, code=code))

    def stats(self) -> Stats:
        """Since the last ones."""
        now, seconds = monotonic(), self._step_seconds
        running = sum(job.stage is not Stage.ENCODE and job.begun > 0 for job in self.jobs.values())
        found = Stats(
            running=running,
            waiting=len(self.jobs) - running,
            step=self.steps,
            out_of_memory=self.out_of_memory,
            step_seconds=seconds,
            pixel_throughput=self._pixels / max(now - self._since, 1e-9),
            cache_hit_rate=self.conditions.hits / max(1, self.conditions.hits + self.conditions.misses),
        )
        self._step_seconds, self._pixels, self._since = [], 0, now
        return found


def _show(told: Painted, pixels_HWC: NDArray[np.uint8], preview: int = -1) -> None:
    told.height, told.width = pixels_HWC.shape[:2]
    told.pixels, told.preview = pixels_HWC.tobytes(), preview
