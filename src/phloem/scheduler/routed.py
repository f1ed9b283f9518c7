"""Which experts computed the tokens of a request, as its steps tell it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Routed:
    """Grows with each step of the request. Positions that a step computes again (drafts that were refused, everything
    after a preemption) replace what was told of them before."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.int16]] = []
        self.count = 0  # tokens, from the first on

    def take(self, start: int, found: NDArray[np.int16]) -> None:
        """[tokens, layers, k] from position `start` on."""
        while self.count > start:
            last = self._parts.pop()
            self.count -= len(last)
            if self.count < start:
                self._parts.append(last[: start - self.count])
                self.count = start
        self._parts.append(found)
        self.count += len(found)

    def told(self, count: int) -> bytes:
        """Little-endian int16 of the first `count` tokens."""
        if not self._parts:
            return b""
        whole = np.concatenate(self._parts)[:count]
        self._parts = [whole]
        self.count = len(whole)
        return whole.astype("<i2", copy=False).tobytes()
