"""Guided pictures on two devices: rows of negative prompts are computed beside those of prompts, at the same time.

The second device has a copy of the transformers, and nothing else of the pipeline; each step brings latents there and
predictions back. Where both are the one processor, the copies share their weights.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from phloem.diffusion.twin import Twin, condition_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from phloem.core.caching import StepCaching
    from phloem.diffusion.family import Family, Row
    from phloem.diffusion.request import Job


class Beside:
    """Args: who draws, before any adapter or step cache stands in its transformers; the other device.

    Raises what a copy of the weights raises for which there is no memory.
    """

    def __init__(self, painter: Family, device: torch.device) -> None:
        self._other = Twin(painter, device)
        self.twin = self._other.painter
        self._painter, self._device = painter, device
        self._pool = ThreadPoolExecutor(1, "negative rows")

    def close(self) -> None:
        self._pool.shutdown()

    def take(self, job: Job, rule: StepCaching) -> None:
        """Make a job ready whose conditions are read: its negative one belongs there."""
        job.conditions[1:] = [condition_at(one, self._device) for one in job.conditions[1:]]
        if rule.threshold > 0:
            self.twin.cache_steps(job, rule)

    def forward(self, rows: Sequence[Row], negative: Sequence[bool]) -> list[Tensor]:
        """v of each row. Raises what either side raises, once neither computes any more."""
        away = [at for at, there in enumerate(negative) if there]
        if not away:
            return self._painter.forward(rows)
        here = [at for at, there in enumerate(negative) if not there]
        future = self._pool.submit(self._other.forward, [rows[at] for at in away])
        try:
            found = dict(zip(here, self._painter.forward([rows[at] for at in here]), strict=True))
        finally:
            future.exception()  # waits: a step that failed on one side must not go on at the other
        found |= zip(away, future.result(), strict=True)
        return [found[at] for at in range(len(rows))]
