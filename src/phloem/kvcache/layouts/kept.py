"""One vector of every token in a type of its own: its halves as two tensors `[pages, 1, S, size / 2]`, so that what
writes keys and values writes it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.core.memory import Kept
from phloem.kvcache.layouts._storage import Tensors, zeros

if TYPE_CHECKING:
    from torch import dtype

SPEC = Kept


class Layout:
    def __init__(self, spec: Kept, dtype: dtype) -> None:
        del dtype  # of keys and values, which may have few bits
        kind = vars(torch).get(spec.kind)
        if not isinstance(kind, torch.dtype) or spec.size % 2:
            raise ValueError(f"{spec.size} numbers of type {spec.kind!r} are not kept by page")
        self._half, self._dtype = spec.size // 2, kind
        self.bytes = spec.size * kind.itemsize

    def make(self, count: int, page_size: int, device: torch.device) -> Tensors:
        keys, values = (zeros((count, 1, page_size, self._half), self._dtype, device) for _ in range(2))
        return Tensors((keys, values), keys, values)
