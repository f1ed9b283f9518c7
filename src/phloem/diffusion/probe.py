"""How many latent tokens fill a step: beyond, more rows take as much longer as they are more."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import torch

from phloem.core.messages import Draw, Pixels
from phloem.diffusion.family import rows_of
from phloem.diffusion.request import Guidance, Job

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.diffusion.family import Family, Row
    from phloem.diffusion.twin import Company

MOST_ROWS = 16
WORTH = 1.1  # so many times the rows a second make a larger step worth it
PATIENCE = 2.0  # seconds: where one row takes longer, the start does not wait for more


def budget(painter: Family, finish: Callable[[], None], company: Company | None = None) -> tuple[int, str]:
    """Latent tokens of a step, and why; runs every stage once, so that the first request finds them warm.

    `finish` waits for the device; `company` computes with the painter, where anybody does. Raises what the model
    raises.
    """

    def forward(rows: list[Row]) -> list[Tensor]:
        return painter.forward(rows) if company is None else company.forward(rows, [False] * len(rows))

    facts = painter.facts
    frames = min(facts.frames, facts.frame_grid + 1) if facts.films else 1  # more are worth no more to the question
    tokens = painter.tokens(facts.width, facts.height) * facts.latent_frames(frames)
    with torch.inference_mode():
        job = _job(painter, frames)
        assert job.latents is not None
        (row,) = rows_of(job)
        seconds = _seconds(forward, [row], finish)
        painter.drawn(job, job.latents)
        count, rate = 1, 1 / seconds
        while count < MOST_ROWS and seconds < PATIENCE:
            seconds = _seconds(forward, [row] * (2 * count), finish)
            if 2 * count / seconds < WORTH * rate:
                break
            count, rate = 2 * count, 2 * count / seconds
    size = f"{facts.width}x{facts.height}" + (f" with {frames} frames" if facts.films else "")
    return tokens * count, f"{count} rows of {size} fill a step: {rate:.2f} rows/s (probed)"


def _job(painter: Family, frames: int) -> Job:
    """One that leaves everything open, before its first step."""
    facts, grey = painter.facts, Pixels(64, 64, bytes([128]) * (64 * 64 * 3))
    draw = Draw(id="", prompt="", seed=0, film=facts.films, pictures=[grey] if facts.needs_pictures else [])
    guidance = Guidance(facts.guidance or 0.0)
    job = Job(draw, 0, facts.width, facts.height, facts.steps, guidance, 0, frames=frames)
    job.conditions = [painter.condition_of("", draw.pictures if painter.reads_pictures else [])]
    painter.prepared(job)
    return job


def _seconds(forward: Callable[[list[Row]], list[Tensor]], rows: list[Row], finish: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(2):
        begun = perf_counter()
        forward(rows)
        finish()
        best = min(best, perf_counter() - begun)
        if best > PATIENCE:
            break
    return best
