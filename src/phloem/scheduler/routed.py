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
        self._given = 0  # of these, by `news`; they are not computed otherwise again

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

    def news(self, count: int) -> bytes:
        """Little-endian int16 of those of the first `count` tokens that have not been given yet."""
        found, end = list["NDArray[np.int16]"](), self.count
        for part in reversed(self._parts):
            if end <= self._given:
                break
            begin = end - len(part)
            found.append(part[max(0, self._given - begin) : max(0, count - begin)])
            end = begin
        self._given = max(self._given, min(count, self.count))
        return b"".join(part.astype("<i2", copy=False).tobytes() for part in reversed(found))
