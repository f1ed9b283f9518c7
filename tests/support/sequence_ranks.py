"""One of several processes that draw the same pictures, each with a part of their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from phloem.checkpoint.pictures import pictures_of
from phloem.core.messages import Draw
from phloem.diffusion import models
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.sequence import Share
from phloem.distributed.choose import connect

CPU = torch.device("cpu")


def painter_of(folder: Path) -> Any:
    found = pictures_of(folder)
    assert found is not None
    pipe = models.load(found, CPU, torch.float32, tiling=False)
    return models.choose(pipe, CPU, torch.float32, {"size": (64, 32), "frames": 5})[0]


def latents_of(painter: Any, draws: list[Draw], company: Any = None) -> dict[str, torch.Tensor]:
    """The last ones of each; the second picture joins when the first has done a step."""
    told: list[Any] = []
    studio, found = Studio(painter, Settings(budget=1 << 20), told.append), dict[str, torch.Tensor]()
    studio.beside = company
    left = list(draws)
    studio.submit(left.pop(0))
    count = 0
    while studio.step():
        found |= {job.id: job.latents for job in studio.jobs.values() if job.latents is not None}
        count += 1
        if left and count >= 2:
            studio.submit(left.pop(0))
    errors = [one.error for one in told if getattr(one, "error", "")]
    assert not errors, errors
    return found


def rank_of(folder: Path, place: Path, name: str, rank: int, size: int, draws: list[Draw]) -> None:
    """Entry of a process: draws, and leaves what it has drawn beside `place`."""
    torch.set_num_threads(1)
    painter = painter_of(folder)
    Share(painter, connect(name, rank, size, place, 600.0))
    torch.save(latents_of(painter, draws), place.with_name(f"{rank}.pt"))
