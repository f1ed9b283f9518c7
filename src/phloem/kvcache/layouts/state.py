"""The state of a recurrent layer: its tensors by slot, `[slots, *shape]`, each in a type of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from phloem.core.memory import State
from phloem.kvcache.layouts._storage import Tensors, zeros

if TYPE_CHECKING:
    from torch import Tensor

SPEC = State


class Layout:
    def __init__(self, spec: State, dtype: torch.dtype) -> None:
        del dtype  # a state adds up over a whole text: its type is the model's to say
        self._tensors = [(shape, _dtype(name)) for shape, name in spec.tensors]
        self.bytes = sum(math.prod(shape) * kind.itemsize for shape, kind in self._tensors)

    def make(self, count: int, page_size: int, device: torch.device) -> Tensors:
        del page_size
        states: tuple[Tensor, ...] = tuple(zeros((count, *shape), kind, device) for shape, kind in self._tensors)
        return Tensors(states, states=states)


def _dtype(name: str) -> torch.dtype:
    """Raises ValueError when torch has no such type."""
    found = vars(torch).get(name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"a state of type {name!r}: torch has no such type")
    return found
