"""Guided pictures on two devices: rows of negative prompts are computed beside those of prompts, at the same time.

The second device has a copy of the transformers, and nothing else of the pipeline; each step brings latents there and
predictions back. Where both are the one processor, the copies share their weights.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.caching import StepCaching
    from phloem.diffusion.family import Family, Row
    from phloem.diffusion.lora import Lora
    from phloem.diffusion.request import Condition, Job

NAMES = ("transformer", "transformer_2")


class Beside:
    """Args: who draws, before any adapter or step cache stands in its transformers; the other device.

    Raises what a copy of the weights raises for which there is no memory.
    """

    def __init__(self, painter: Family, device: torch.device) -> None:
        pipe = copy.copy(painter.pipe)
        for name in NAMES:
            model = painter.pipe.components.get(name)
            if model is not None:
                setattr(pipe, name, _copied(model, painter.device, device))
        self.twin = type(painter)(pipe, device, painter.dtype, {"fps": painter.facts.fps})
        self._painter, self._device = painter, device
        self._worn: WeakKeyDictionary[Lora, Lora] = WeakKeyDictionary()
        self._pool = ThreadPoolExecutor(1, "negative rows")

    def close(self) -> None:
        self._pool.shutdown()

    def take(self, job: Job, rule: StepCaching) -> None:
        """Make a job ready whose conditions are read: its negative one belongs there."""
        job.conditions[1:] = [_moved(one, self._device) for one in job.conditions[1:]]
        if rule.threshold > 0:
            self.twin.cache_steps(job, rule)

    def forward(self, rows: Sequence[Row], negative: Sequence[bool]) -> list[Tensor]:
        """v of each row. Raises what either side raises, once neither computes any more."""
        away = [at for at, there in enumerate(negative) if there]
        if not away:
            return self._painter.forward(rows)
        here = [at for at, there in enumerate(negative) if not there]
        future = self._pool.submit(self._there, [rows[at] for at in away])
        try:
            found = dict(zip(here, self._painter.forward([rows[at] for at in here]), strict=True))
        finally:
            future.exception()  # waits: a step that failed on one side must not go on at the other
        found |= zip(away, future.result(), strict=True)
        return [found[at] for at in range(len(rows))]

    def _there(self, rows: list[Row]) -> list[Tensor]:
        with torch.inference_mode():
            seen = {id(row.seen): _seen(row.seen, self._device) for row in rows}
            moved = [
                replace(
                    row,
                    latents=row.latents.to(self._device),
                    seen=seen[id(row.seen)],
                    worn=tuple((self._lora(one), scale) for one, scale in row.worn),
                )
                for row in rows
            ]
            return [v.to(self._painter.device) for v in self.twin.forward(moved)]

    def _lora(self, adapter: Lora) -> Lora:
        if adapter not in self._worn:
            self.twin.wearing.prepare(adapter)
            self._worn[adapter] = adapter.at(self._device, self._painter.dtype)
        return self._worn[adapter]


def _copied(model: torch.nn.Module, here: torch.device, there: torch.device) -> torch.nn.Module:
    if here != there:
        return copy.deepcopy(model).to(there)
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(one): one for one in shared})


def _moved(condition: Condition, device: torch.device) -> Condition:
    pooled = condition.pooled_E
    return replace(
        condition, states_SE=condition.states_SE.to(device), pooled_E=None if pooled is None else pooled.to(device)
    )


def _seen(seen: Any, device: torch.device) -> Any:
    if seen is None:
        return None
    embeds = seen.embeds_SE
    return replace(seen, latents=seen.latents.to(device), embeds_SE=None if embeds is None else embeds.to(device))
