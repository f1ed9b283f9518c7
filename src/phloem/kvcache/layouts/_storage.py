"""Zeroed tensors, and what a layout makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from phloem.platforms._facts import in_host_memory
from phloem.utils import memory

if TYPE_CHECKING:
    from torch import Tensor

SCALE_BYTES = 4  # an int8 entry has a float32 scale


@dataclass(frozen=True, slots=True)
class Tensors:
    """A layer's memory. `stored`: what has memory of its own; the others are these, or views of them."""

    stored: tuple[Tensor, ...]
    keys: Tensor | None = None  # [pages, K, S, D]
    values: Tensor | None = None
    states: tuple[Tensor, ...] = ()  # each [slots, *shape]


def entry_size(head_size: int, dtype: torch.dtype) -> int:
    """Elements that one head's key or value takes in a cache of this type."""
    return head_size + SCALE_BYTES if dtype == torch.int8 else head_size


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; in host memory straight from the system, so that a page costs nothing before it is used."""
    if not in_host_memory(device):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(memory.zeros(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)
