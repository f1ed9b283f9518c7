"""Attention without data: what our own kernels do beside a backend's, for whoever wants to know which are launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem import attention
from phloem.attention import flashinfer, reference
from phloem.attention._store import store
from phloem.kernels.shapes_only import shapes_only

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.attention import AttentionBackend, AttentionNeed
    from phloem.kernels.ops import Ops, PagedBatch
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, Heads

OURS = ("triton", reference.Backend.name)  # their steps run on tensors without data


def backend_without_data(
    name: str, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """The backend of that name, of which nothing is computed that our kernels do not. `ops`: as `shapes_only` gives."""
    made: Any = attention.BACKENDS.get(name)(ops, specs, device, dtype)
    if isinstance(made, reference.Backend):
        made.plain = shapes_only(made.plain)
    return made if name in OURS else Foreign(made)


class Foreign:
    """A backend whose attention is another package's: keys and values are written by our kernels, that is all."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.name: str = inner.name
        self.ops: Ops = inner.ops
        self.page_size: int = inner.page_size
        self.recordable: bool = inner.recordable

    def decline(self, need: AttentionNeed) -> str | None:
        return self._inner.decline(need)

    def begin(self, batch: PagedBatch, pool: KVPool) -> _Step:
        return _Step(self, batch, pool)

    def writing(self, pool: KVPool, layer: int) -> Ops:
        """The op table as it writes this layer's keys and values."""
        return self._inner.writing(pool, layer) if isinstance(self._inner, flashinfer.Backend) else self.ops


@dataclass(slots=True)
class _Step:
    backend: Foreign
    batch: PagedBatch
    pool: KVPool

    def __call__(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        keys, values = self.pool.keys[spec.pool], self.pool.values[spec.pool]
        ops = self.backend.writing(self.pool, spec.pool)
        q_THD = store(ops, spec, heads, (keys, values), self.batch.token_slots)
        return torch.empty((*q_THD.shape[:2], spec.values), dtype=q_THD.dtype, device=q_THD.device)
