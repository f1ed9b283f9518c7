"""The host beside the device, as the layers whose routed experts it has see it: its op table, its thread, what it was
asked to compute and has not given yet. `layers/placed.py` says what becomes of it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.distributed.experts import Move, Table
    from phloem.kernels.ops import Ops
    from phloem.platforms._streams import Streams

HOST = torch.device("cpu")
T = TypeVar("T")


class Shared(Protocol):
    """A layer whose experts lie in both places (`PlacedExperts`)."""

    residents: list[int]  # experts that are on the device

    def put(self, experts: list[int]) -> None: ...

    def exchange(self, comes: int, goes: int) -> None: ...

    def refresh(self, changed: set[int]) -> None: ...

    def prefetch(self) -> None: ...

    @property
    def host_bytes(self) -> int: ...

    @property
    def device_bytes(self) -> int: ...


@dataclass(slots=True)
class Late:
    """Outputs of experts that a layer deferred: the host's are perhaps still being computed."""

    near: Tensor | None  # [T, N] on the device
    far: Future[Tensor] | None
    rows: Tensor | None = None  # which of the tokens go on; None: all


class Aside:
    """The host's half: its op table, its thread, and the layers whose experts it has.

    Args:
        ops: the host's table.
        same: it is the device's table too, so that there is nothing to overlap and nothing to copy.
        deferred: d of every sparse layer but the last.
        streams_from: a step of so many tokens has all experts copied to the device, layer by layer; None: none has.
        streams: of the device, whose pinned buffers what crosses goes through; None: it is copied plainly.
    """

    def __init__(
        self,
        ops: Ops,
        *,
        same: bool = False,
        deferred: int = 0,
        streams_from: int | None = None,
        streams: Streams | None = None,
    ) -> None:
        self._streams = streams
        self.ops, self.same, self.deferred, self.streams_from = ops, same, deferred, streams_from
        self.layers: list[Shared] = []
        self.pending: Late | None = None  # what the sparse layer before this one deferred
        self.counts: NDArray[np.int64] = np.zeros((0, 0), dtype=np.int64)  # [layers, E] tokens that chose the expert
        self.busy = self.waited = 0.0  # seconds that the host computed, and that the device's thread waited for it
        self.moved = self.steps = 0
        self._thread = None if same else ThreadPoolExecutor(1, "phloem-experts")

    def enter(self, layer: Shared, experts: int) -> int:
        """The number of a layer, in the order of the model.

        Raises:
            ModelLoadError: it has another number of experts than those before it.
        """
        if self.layers and experts != self.counts.shape[1]:
            raise ModelLoadError("experts on the host: layers with different numbers of experts are not placed")
        self.layers.append(layer)
        self.counts = np.zeros((len(self.layers), experts), dtype=np.int64)
        return len(self.layers) - 1

    def defers(self, number: int, k: int) -> int:
        """How many of k experts this layer defers; one at least is its own."""
        return 0 if number == len(self.layers) - 1 else min(self.deferred, k - 1)

    def keep(self, rows_L: Tensor | None) -> None:
        """Behind here the step goes on with these of its tokens alone (None: all)."""
        if self.pending is not None:
            self.pending.rows = rows_L

    def to_host(self, *tensors: Tensor) -> list[Tensor]:
        """All of them by one wait: for their copy, behind what the device has been given so far."""
        if self._streams is None:
            return [tensor.to(HOST) for tensor in tensors]
        arriving = self._streams.down(tensors)
        arriving.event.synchronize()
        return arriving.host

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Without a wait, where there are pinned buffers: before what the device is given next."""
        if self._streams is None or tensor.device == device:
            return tensor.to(device)
        return self._streams.up([tensor.numpy()])[0]

    def submit(self, work: Callable[[], Tensor]) -> Future[Tensor]:
        """Compute on the host, one after the other."""

        def timed() -> Tensor:
            begun = perf_counter()
            found = _inferring(work)
            self.busy += perf_counter() - begun
            return found

        if self._thread is not None:
            return self._thread.submit(timed)
        done: Future[Tensor] = Future()
        done.set_result(timed())
        return done

    def send(self, work: Callable[[], T]) -> Future[T]:
        """Make ready for the device, in the same thread."""
        if self._thread is not None:
            return self._thread.submit(_inferring, work)
        done: Future[T] = Future()
        done.set_result(work())
        return done

    def wait(self, found: Future[Tensor]) -> Tensor:
        begun = perf_counter()
        value = found.result()
        self.waited += perf_counter() - begun
        return value

    def put(self, table: Table) -> None:
        """Copy experts to the device as the table says: when weights are there, and after they have changed."""
        for layer, row in zip(self.layers, table, strict=True):
            layer.put(np.flatnonzero(row).tolist())

    def refresh(self, changed: set[int]) -> None:
        """Copy anew what is on the device of these weights (their `id`s), which have changed on the host."""
        for layer in self.layers:
            layer.refresh(changed)

    def move(self, moves: list[Move]) -> None:
        """Between two steps."""
        for one in moves:
            self.layers[one.layer].exchange(one.comes, one.goes)
        self.moved += len(moves)

    @property
    def table(self) -> Table:
        """Which experts are on the device, [layers, E]."""
        found = np.zeros(self.counts.shape, dtype=np.bool_)
        for row, layer in zip(found, self.layers, strict=True):
            row[layer.residents] = True
        return found

    @property
    def hidden_share(self) -> float:
        """Of the host's time, the part that nobody waited for."""
        return max(0.0, 1.0 - self.waited / self.busy) if self.busy else 0.0

    @property
    def host_bytes(self) -> int:
        """Of the experts on the host."""
        return sum(layer.host_bytes for layer in self.layers)

    @property
    def device_bytes(self) -> int:
        """Of the copies on the device."""
        return sum(layer.device_bytes for layer in self.layers)


def _inferring(work: Callable[[], T]) -> T:
    with torch.inference_mode():
        return work()
