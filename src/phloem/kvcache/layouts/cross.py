"""Keys and values that are read crosswise: as those of `mha`, in pages that belong to slots of the runner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.memory import Cross, Paged
from phloem.kvcache.layouts import mha

if TYPE_CHECKING:
    import torch

SPEC = Cross


class Layout(mha.Layout):
    def __init__(self, spec: Cross, dtype: torch.dtype) -> None:
        super().__init__(Paged(spec.kv_heads, spec.key_size, spec.value_size), dtype)
