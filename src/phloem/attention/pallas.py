"""Attention by a table's own kernel over pages (`Ops.page_kernel`), as jax's has one in Pallas."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from phloem.attention.reference import TableStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from phloem.attention import AttentionNeed
    from phloem.kernels.ops import Ops, PagedBatch
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec


class Backend:
    name = "pallas"
    page_size = 16
    recordable = False  # steps over such a table are compiled whole

    def __init__(self, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype) -> None:
        del specs, device, dtype
        self._missing = f"the op table {ops.name!r} has no Pallas kernel" if ops.page_kernel is None else None
        self._heads = ops.page_kernel_heads
        self.ops = ops if ops.page_kernel is None else replace(ops, paged_attention=ops.page_kernel)

    def decline(self, need: AttentionNeed) -> str | None:
        if self._missing is not None:
            return self._missing
        sizes = {size for spec in need.specs for size in (spec.head_size, spec.values)}
        odd = sorted(size for size in sizes if size % self._heads)
        if odd:
            return (
                f"heads of {odd[0]}: the compiler would copy the caches for each call unless they are multiples of 128"
            )
        return None

    def begin(self, batch: PagedBatch, pool: KVPool) -> TableStep:
        return TableStep(self.ops, batch, pool)
