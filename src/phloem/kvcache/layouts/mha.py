"""Keys and values by head: two tensors `[pages, K, S, D]`.

With int8 `[pages, K, S, D + 4]`: values and scales of a page, in the order that csrc/cpu/int8_page.h describes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.memory import Paged
from phloem.kvcache.layouts._storage import Tensors, entry_size, zeros

if TYPE_CHECKING:
    import torch

SPEC = Paged


class Layout:
    def __init__(self, spec: Paged, dtype: torch.dtype) -> None:
        self._heads, self._dtype = spec.kv_heads, dtype
        self._sizes = entry_size(spec.key_size, dtype), entry_size(spec.value_size, dtype)
        self.bytes = self._heads * sum(self._sizes) * dtype.itemsize

    def make(self, count: int, page_size: int, device: torch.device) -> Tensors:
        keys, values = (zeros((count, self._heads, page_size, size), self._dtype, device) for size in self._sizes)
        return Tensors((keys, values), keys, values)
