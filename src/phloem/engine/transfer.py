"""Values between host and device: a step's inputs on their way up, its tokens on their way down.

The last token of each slot stays on the device, where the next step takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.engine.wanted import Wanted
    from phloem.platforms._streams import Streams


class Coming(Protocol):
    """Device values on their way to the host."""

    def done(self) -> bool: ...

    def wait(self) -> list[NDArray[Any]]: ...


@dataclass(slots=True)
class Here:
    """Values that are waited for where they are read: the counterpart of `Streams.down` without streams."""

    tensors: Sequence[Tensor]

    def done(self) -> bool:
        return True

    def wait(self) -> list[NDArray[Any]]:
        return [tensor.cpu().numpy() for tensor in self.tensors]


@dataclass(slots=True)
class Known:
    """Values that the host has."""

    values: list[NDArray[Any]]

    def done(self) -> bool:
        return True

    def wait(self) -> list[NDArray[Any]]:
        return self.values


def plain_up(device: torch.device) -> Callable[[Sequence[NDArray[Any]]], list[Tensor]]:
    """Host arrays to the device one by one: the counterpart of `Streams.up` without streams."""

    def up(arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True) for array in arrays]

    return up


class LastTokens:
    """The last sampled token of each slot. `host`: the same memory as an array, where the device is the host."""

    def __init__(self, slots: int, device: torch.device, on_host: bool, streams: Streams | None) -> None:
        self.values = torch.zeros(slots, dtype=torch.int64, device=device)
        self.host: NDArray[np.int64] | None = self.values.numpy() if on_host else None
        self.up = streams.up if streams is not None else plain_up(device)
        self._down: Callable[[Sequence[Tensor]], Coming] = streams.down if streams is not None else Here

    def keep(self, wanted: Wanted, tokens_L: Tensor, sound_L: Tensor) -> Coming:
        """Keep what the next step begins with, and send all tokens and whether each is damaged on their way.

        `sound_L`: a number of each position that is NaN where its logits are.
        """
        damaged_L = torch.isnan(sound_L)
        if self.host is not None:
            values = tokens_L.numpy()
            if wanted.drafts is None:
                self.host[wanted.slots] = values
            else:
                last = wanted.last(values)
                self.host[wanted.slots[last]] = values[last]
            return Known([values, damaged_L.numpy()])
        if wanted.starts is None:
            (index,) = self.up([wanted.slots.astype(np.int64)])
            self.values[index] = tokens_L.long()
        else:
            (index,) = self.up([wanted.slots[wanted.starts].astype(np.int64)])
            self.values[index] = tokens_L[wanted.last_on_device(tokens_L, self.up)[0]].long()
        return self._down([tokens_L.to(torch.int32), damaged_L])
