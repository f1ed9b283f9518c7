"""A second one who draws: a family over a copy of its transformers, on another device or in another thread.

Nothing else of the pipeline is copied. Where both are the one processor, the copies share their weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.caching import StepCaching
    from phloem.diffusion.family import Family, Row
    from phloem.diffusion.lora import Lora
    from phloem.diffusion.request import Condition, Job, Seen

NAMES = ("transformer", "transformer_2")


class Company(Protocol):
    """Who else computes the rows of a step."""

    def close(self) -> None: ...

    def take(self, job: Job, rule: StepCaching) -> None:
        """Make a job ready whose conditions are read. Raises BadRequest."""
        ...

    def forward(self, rows: Sequence[Row], negative: Sequence[bool]) -> list[Tensor]:
        """v of each row; `negative`: which are those of negative prompts. Raises what any of them raises."""
        ...


class Twin:
    """Args: who draws, before any adapter or step cache stands in its transformers; the other's device.

    Raises what a copy of the weights raises for which there is no memory.
    """

    def __init__(self, painter: Family, device: torch.device) -> None:
        pipe = copy.copy(painter.pipe)
        for name in NAMES:
            model = painter.pipe.components.get(name)
            if model is not None:
                setattr(pipe, name, _copied(model, painter.device, device))
        self.painter = type(painter)(pipe, device, painter.dtype, {"fps": painter.facts.fps})
        self._there, self._back = device, painter.device
        self._worn: WeakKeyDictionary[Lora, Lora] = WeakKeyDictionary()

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        """v of each row, back on the first one's device. Raises what the model raises."""
        with torch.inference_mode():
            return [v.to(self._back) for v in self.painter.forward(self.moved(rows))]

    def moved(self, rows: Sequence[Row]) -> list[Row]:
        """The rows there."""
        seen = {id(row.seen): seen_at(row.seen, self._there) for row in rows}
        return [
            replace(
                row,
                latents=row.latents.to(self._there),
                condition=condition_at(row.condition, self._there),
                seen=seen[id(row.seen)],
                worn=tuple((self._lora(one), scale) for one, scale in row.worn),
            )
            for row in rows
        ]

    def _lora(self, adapter: Lora) -> Lora:
        if adapter not in self._worn:
            self.painter.wearing.prepare(adapter)
            self._worn[adapter] = adapter.at(self._there, self.painter.dtype)
        return self._worn[adapter]


def _copied(model: torch.nn.Module, here: torch.device, there: torch.device) -> torch.nn.Module:
    if here != there:
        return copy.deepcopy(model).to(there)
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(one): one for one in shared})


def condition_at(condition: Condition, device: torch.device) -> Condition:
    states, pooled = condition.states_SE, condition.pooled_E
    if states.device == device and (pooled is None or pooled.device == device):
        return condition
    return replace(condition, states_SE=states.to(device), pooled_E=None if pooled is None else pooled.to(device))


def seen_at(seen: Seen | None, device: torch.device) -> Any:
    if seen is None:
        return None
    embeds = seen.embeds_SE
    return replace(seen, latents=seen.latents.to(device), embeds_SE=None if embeds is None else embeds.to(device))
