"""Memory that another process lends on the same device, by the handle that torch makes of a tensor there.

torch opens it (`torch.multiprocessing.reductions`); what it is given has been checked, and the device is always this
engine's own, whatever number the lender knows it by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from phloem.core.errors import BadRequest

HOST = "CPU"


@dataclass(frozen=True, slots=True)
class Handle:
    """A tensor of `size` bytes of memory, `start` bytes behind where the allocation `memory` begins."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements
    dtype: str
    device: str  # its UUID, where the lender says it
    memory: bytes
    size: int
    start: int
    counter: bytes
    counter_at: int
    event: bytes
    wait: bool

    @property
    def itemsize(self) -> int:
        return _dtype(self.dtype).itemsize


def _dtype(name: str) -> torch.dtype:
    return vars(torch)[name]


def name_of(device: torch.device) -> str:
    """What checkpoint-engine calls a device: `GPU-` and its UUID; `CPU` for the host; "" for what it does not know."""
    if device.type == "cpu":
        return HOST
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


class Lent:
    """Memory of this device that is lent, as bytes. Copies are on the device.

    Raises:
        BadRequest: it cannot be opened.
    """

    def __init__(self, handle: Handle, device: torch.device) -> None:
        self._device = device
        self._tensor = opened(handle, device)
        self.size = self._tensor.nbytes

    def read(self, start: int, size: int) -> torch.Tensor:
        return self._tensor[start : start + size].clone()

    def settle(self) -> None:
        """Wait until the copies are made: the lender writes the next bucket then."""
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        del self._tensor
        torch.cuda.ipc_collect()


def copied(handle: Handle, device: torch.device) -> torch.Tensor:
    """A copy on this device, which is there. Raises BadRequest."""
    found = opened(handle, device).clone()
    torch.cuda.synchronize(device)
    return found


def opened(handle: Handle, device: torch.device) -> torch.Tensor:
    """The lender's own memory. Raises BadRequest: it is another device's, or gone."""
    own = name_of(device)
    if not own.startswith("GPU-"):
        raise BadRequest(f"the tensors are on a GPU: this engine's device is {device.type}; send tensor.cpu()")
    if handle.device and handle.device not in (own, own.removeprefix("GPU-")):
        raise BadRequest(f"the tensors are on {handle.device:.60}, this engine is on {own}")
    try:
        return rebuild_cuda_tensor(
            torch.Tensor, torch.Size(handle.shape), handle.stride, handle.offset, torch.storage.TypedStorage,
            _dtype(handle.dtype), device.index or 0, handle.memory, handle.size, handle.start, False, handle.counter,
            handle.counter_at, handle.event, handle.wait,
        )  # fmt: skip
    except (RuntimeError, OSError, ValueError) as error:
        raise BadRequest(f"the device's memory cannot be opened: {str(error)[:200]}") from None
