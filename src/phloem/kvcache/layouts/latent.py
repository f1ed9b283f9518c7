"""One compressed vector of every token, and behind it its rotated part: `[pages, 1, S, rank + rope]`.

There is no tensor of values: they are the first `rank` columns (multi-head latent attention, DeepSeek-V2, 2024).
"""

from __future__ import annotations

import torch

from phloem.core.errors import ConfigError
from phloem.core.memory import Latent
from phloem.kvcache.layouts._storage import Tensors, zeros

SPEC = Latent


class Layout:
    def __init__(self, spec: Latent, dtype: torch.dtype) -> None:
        if dtype == torch.int8:
            raise ConfigError("kv_cache_dtype: int8 is not for latent attention: one scale would serve two parts")
        if not spec.rope and dtype.itemsize == 1:
            raise ConfigError(f"kv_cache_dtype: {dtype} is not for an indexer's keys, whose order 8 bits would change")
        self._rank, self._size, self._dtype = spec.rank, spec.rank + spec.rope, dtype
        self.bytes = self._size * dtype.itemsize

    def make(self, count: int, page_size: int, device: torch.device) -> Tensors:
        keys = zeros((count, 1, page_size, self._size), self._dtype, device)
        return Tensors((keys,), keys, keys[..., : self._rank])
