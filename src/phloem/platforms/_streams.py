"""Copies beside the computation: pinned host buffers, written once per step, and a stream of their own.

Two rules keep the device from waiting. What a step reads goes up in one copy out of a buffer that nobody writes again
before that copy has ended (a ring, guarded by events). What a step gives comes down on the copy stream, behind an
event of the computing stream; the host waits for that copy alone, while the device computes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from phloem.platforms._facts import in_host_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

ALIGNMENT = 16  # bytes: kernels load aligned vectors
MOST = 64  # buffers of the ring


@dataclass(slots=True)
class Arriving:
    """Device values on their way to the host."""

    host: list[Tensor]
    event: Any
    check: Callable[[], None] | None = None  # raises where the values are worth nothing

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> list[NDArray[Any]]:
        """Wait for the copy (for no other work of the device) and give the values."""
        self.event.synchronize()
        if self.check is not None:
            self.check()
        return [tensor.numpy() for tensor in self.host]


class Streams:
    """One copy stream and a ring of staging buffers, of which a step takes few; it grows where they are all in use.

    `cuda` is torch.cuda, or what stands in for it in a test.
    """

    def __init__(self, device: torch.device, ring: int = 8, cuda: Any = torch.cuda, pin: bool = True) -> None:
        self.device = device
        self._cuda = cuda
        self._pin = pin
        self._copy = cuda.Stream(device)
        # Asked when values have come. Where several devices meet, those that were ended give what nobody computed.
        self.check: Callable[[], None] | None = None
        self._buffers: list[Tensor | None] = [None] * ring
        self._used: list[Any] = [None] * ring  # event after the last copy out of the buffer
        self._next = 0

    def up(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Device copies of host arrays, by one transfer on the computing stream. Never waits for the device, unless
        all buffers of the ring are still being copied.
        """
        starts: list[int] = []
        size = 0
        for array in arrays:
            starts.append(size)
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        buffer = self._buffer(max(size, ALIGNMENT))
        flat = buffer.numpy()
        for array, start in zip(arrays, starts, strict=True):
            flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        moved = buffer[: max(size, ALIGNMENT)].to(self.device, non_blocking=True)
        self._sent()
        return [
            moved[start : start + array.nbytes].view(torch.from_numpy(array[:0].copy()).dtype).view(array.shape)
            for array, start in zip(arrays, starts, strict=True)
        ]

    def into(self, target: Tensor, parts: Sequence[tuple[int, NDArray[Any]]]) -> None:
        """Host arrays to byte places of one device buffer (uint8), by one transfer on the computing stream; what lies
        between the places is undefined afterwards. Waits as `up`."""
        size = max(at + array.nbytes for at, array in parts)
        buffer = self._buffer(size)
        flat = buffer.numpy()
        for at, array in parts:
            flat[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        target[:size].copy_(buffer[:size], non_blocking=True)
        self._sent()

    def down(self, tensors: Sequence[Tensor]) -> Arriving:
        """Start to copy device tensors to the host, behind what the computing stream has been given so far."""
        ready = self._cuda.Event()
        ready.record()
        with self._cuda.stream(self._copy):
            self._copy.wait_event(ready)
            host: list[Tensor] = []
            for tensor in tensors:
                # The tensor must not be given to another step before the copy has read it.
                if not in_host_memory(tensor.device):
                    tensor.record_stream(self._copy)
                target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin)
                host.append(target.copy_(tensor, non_blocking=True))
            event = self._cuda.Event()
            event.record(self._copy)
        return Arriving(host, event, self.check)

    def apart(self) -> None:
        """From now on what the calling thread gives the device is beside the computing stream."""
        self._cuda.set_stream(self._cuda.Stream(self.device))

    def mark(self) -> Any:
        """What the calling thread has given the device so far, for `follow`."""
        event = self._cuda.Event()
        event.record()
        return event

    def follow(self, mark: Any, tensors: Sequence[Tensor]) -> None:
        """What the calling thread gives the device from now on comes behind it, and may use what it has made."""
        stream = self._cuda.current_stream(self.device)
        stream.wait_event(mark)
        for tensor in tensors:
            if not in_host_memory(tensor.device):
                tensor.record_stream(stream)

    def _sent(self) -> None:
        """The buffer is used up to here; the next step takes the next one."""
        event = self._cuda.Event()
        event.record()
        self._used[self._next] = event
        self._next = (self._next + 1) % len(self._buffers)

    def _buffer(self, size: int) -> Tensor:
        used = self._used[self._next]
        if used is not None and len(self._buffers) < MOST and not used.query():
            self._buffers.insert(self._next, None)
            self._used.insert(self._next, None)
        elif used is not None:
            used.synchronize()
        found = self._buffers[self._next]
        if found is None or found.numel() < size:
            grown = 1 << (size - 1).bit_length()
            found = self._buffers[self._next] = torch.empty(grown, dtype=torch.uint8, pin_memory=self._pin)
        return found
