"""Attention through the op table: `store`, then `paged_attention`, whichever the table has. Runs on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phloem.attention._store import store
from phloem.kernels import reference as ref

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from phloem.attention import AttentionNeed
    from phloem.kernels.ops import Ops, PagedBatch, Rotation
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec


def fitting(ops: Ops, dtype: torch.dtype) -> Ops:
    """The table itself, or with the reference attention where its own keeps no cache of this type."""
    if ops.kv_dtypes is None or dtype in ops.kv_dtypes:
        return ops
    return replace(ops, write_kv=ref.write_kv, rope_write_kv=None, paged_attention=ref.paged_attention)


class Backend:
    name = "reference"
    page_size = 16

    def __init__(self, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype) -> None:
        self.ops = fitting(ops, dtype)

    def decline(self, need: AttentionNeed) -> str | None:
        if not need.kv_dtype.is_floating_point and self.ops.paged_attention is ref.paged_attention:
            return f"the reference ops keep no KV cache of type {need.kv_dtype}"
        return None

    def begin(self, batch: PagedBatch, pool: KVPool) -> TableStep:
        return TableStep(self.ops, batch, pool)


@dataclass(slots=True)
class TableStep:
    """One step's attention by the op table."""

    ops: Ops
    batch: PagedBatch
    pool: KVPool

    def __call__(
        self,
        spec: AttentionSpec,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        sinks_H: Tensor | None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        keys, values = self.pool.keys[spec.layer], self.pool.values[spec.layer]
        q_THD = store(self.ops, q_THD, k_TKD, v_TKD, rotation, keys, values, self.batch.token_slots)
        return self.ops.paged_attention(q_THD, keys, values, self.batch, spec.scale, spec.window, spec.softcap, sinks_H)
