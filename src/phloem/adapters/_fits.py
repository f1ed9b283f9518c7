"""What a site keeps of an adapter. Legend as in `_sites`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Fit:
    """What one site keeps of an adapter."""

    rank: int
    down: Tensor  # [P, r, N]
    up: Tensor  # [r, M]
    factor: Tensor | None = None  # [M] float32, both or neither
    shift: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.down, self.up, self.factor, self.shift) if t is not None)
