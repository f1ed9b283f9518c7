"""How many latent tokens fill a step: beyond, more rows take as much longer as they are more."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import torch

from phloem.diffusion.family import Family, Row

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_ROWS = 16
WORTH = 1.1  # so many times the rows a second make a larger step worth it
PATIENCE = 2.0  # seconds: where one row takes longer, the start does not wait for more


def budget(painter: Family, finish: Callable[[], None]) -> tuple[int, str]:
    """Latent tokens of a step, and why; runs every stage once, so that the first request finds them warm.

    `finish` waits for the device. Raises what the model raises.
    """
    facts = painter.facts
    tokens = painter.tokens(facts.width, facts.height)
    with torch.inference_mode():
        condition = painter.encode("")
        latents = painter.seeded(facts.width, facts.height, 0)
        row = Row(latents, 500.0, condition, facts.guidance or 0.0, facts.width, facts.height)
        seconds = _seconds(painter, [row], finish)
        painter.decode(latents, facts.width, facts.height)
        count, rate = 1, 1 / seconds
        while count < MOST_ROWS and seconds < PATIENCE:
            seconds = _seconds(painter, [row] * (2 * count), finish)
            if 2 * count / seconds < WORTH * rate:
                break
            count, rate = 2 * count, 2 * count / seconds
    size = f"{facts.width}x{facts.height}"
    return tokens * count, f"{count} rows of {size} fill a step: {rate:.2f} rows/s (probed)"


def _seconds(painter: Family, rows: list[Row], finish: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(2):
        begun = perf_counter()
        painter.forward(rows)
        finish()
        best = min(best, perf_counter() - begun)
        if best > PATIENCE:
            break
    return best
