"""What kernels are launched for: facts of the device, or of the one that is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@dataclass
class Ahead:
    """The device that is compiled for while there is none: Hopper's multiprocessors, or what `ahead.py` is told.

    `capability`: of an NVIDIA GPU, 90 for 9.0; 0 for all others.
    """

    processors: int = 132
    capability: int = 0


AHEAD = Ahead()


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device; those of `AHEAD` for tensors without data."""
    if tensor.device.type == "cuda":
        return _multiprocessors(tensor.device.index or 0)
    if tensor.device.type == "xpu":
        props = torch.xpu.get_device_properties(tensor.device)
        return int(getattr(props, "gpu_subslice_count", 0) or 32)
    return AHEAD.processors if tensor.device.type == "meta" else 2


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """An NVIDIA GPU's compute capability, 90 for 9.0; that of `AHEAD` where there are no data; 0 for all others."""
    if device.type == "meta":
        return AHEAD.capability
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return _capability(device.index or 0)
