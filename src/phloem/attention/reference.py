"""Attention through the op table: `store`, then `paged_attention`, whichever the table has; the reference's own for
layers that ask more than a kernel serves. Runs on any device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from phloem.attention._store import call_of, store, unserved
from phloem.kernels import reference as ref
from phloem.kernels import reference_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.attention import AttentionNeed
    from phloem.kernels.ops import Ops, PagedBatch
    from phloem.kvcache.pool import KVPool, KVScales
    from phloem.layers.context import AttentionSpec, Heads


def fitting(ops: Ops, dtype: torch.dtype) -> Ops:
    """The table itself, or with the reference attention where its own keeps no cache of this type."""
    if ops.kv_dtypes is None or dtype in ops.kv_dtypes:
        return ops
    return plainly(ops)


def plainly(ops: Ops) -> Ops:
    """The table with the reference's keeping and reading of keys and values."""
    return replace(ops, write_kv=ref.write_kv, rope_write_kv=None, paged_attention=reference_attention.paged_attention)


def fours(need: AttentionNeed, page_size: int) -> str | None:
    """Why an 8-bit integer cache, which keeps four values and four tokens side by side, does not fit; or None."""
    if need.kv_dtype.is_floating_point:
        return None
    if any(spec.head_size % 4 for spec in need.specs) or (need.page_size or page_size) % 4:
        return f"a KV cache of type {need.kv_dtype} takes head sizes and page sizes that are multiples of 4"
    return None


def scaled(ops: Ops, scales: KVScales | None, dtype: torch.dtype) -> Ops:
    """The table with a `write_kv` that divides by the scales and cuts off what a float8 cannot hold."""
    limit = torch.finfo(dtype).max

    def write_kv(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor) -> None:
        k_TKD, v_TKD = k_TKD.float(), v_TKD.float()
        if scales is not None:
            k_TKD, v_TKD = k_TKD / scales.k[:, None], v_TKD / scales.v[:, None]
        ops.write_kv(k_TKD.clamp(-limit, limit), v_TKD.clamp(-limit, limit), k_cache, v_cache, slots_T)

    return replace(ops, write_kv=write_kv, rope_write_kv=None)


def per_head(scale: Tensor, heads: int) -> Tensor:
    """[1] or [K] -> [1, 1] or [H, 1]: a kv head's scale for each of its query heads."""
    return (scale if len(scale) == 1 else scale.repeat_interleave(heads // len(scale)))[:, None]


class Backend:
    name = "reference"
    page_size = 16

    def __init__(self, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype) -> None:
        self.ops = fitting(ops, dtype)
        self.plain = plainly(self.ops)  # for layers that the table's kernels do not serve
        # The reference reads each row's length on the host, for all layers or for those that a kernel does not serve.
        kernel = self.ops.paged_attention is not reference_attention.paged_attention
        self.recordable = kernel and unserved(specs, blocks=self.ops.block_attention) is None

    def decline(self, need: AttentionNeed) -> str | None:
        if not need.kv_dtype.is_floating_point:
            if self.ops.paged_attention is reference_attention.paged_attention:
                return f"the reference ops keep no KV cache of type {need.kv_dtype}"
            odd = unserved(need.specs, blocks=self.ops.block_attention)
            if odd is not None:
                return f"with a KV cache of type {need.kv_dtype} it {odd}"
        return fours(need, self.page_size)

    def begin(self, batch: PagedBatch, pool: KVPool) -> TableStep:
        return TableStep(self.ops, batch, pool, self.plain)


class TableStep:
    """One step's attention by the op table."""

    def __init__(self, ops: Ops, batch: PagedBatch, pool: KVPool, plain: Ops | None = None) -> None:
        self.ops, self.batch, self.pool = ops, batch, pool
        self._plain = plain

    def _table(self, spec: AttentionSpec) -> Ops:
        blocks = not spec.block or (self.ops.block_attention and not spec.window)
        if self.ops.every_attention or (spec.causal and not spec.chunk and blocks and spec.values == spec.head_size):
            return self.ops
        if self._plain is None:
            self._plain = plainly(self.ops)
        return self._plain

    def __call__(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        keys, values = self.pool.keys[spec.pool], self.pool.values[spec.pool]
        scales, table = self.pool.scales.get(spec.pool), self._table(spec)
        ops = table
        if keys.dtype.itemsize == 1 and keys.dtype.is_floating_point:
            ops = scaled(ops, scales, keys.dtype)
        q_THD = store(ops, spec, heads, (keys, values), self.batch.token_slots)
        if scales is not None:
            # Logits are products of q and k: the keys' scale may stand on the queries.
            q_THD = (q_THD.float() * per_head(scales.k, spec.heads)).to(q_THD.dtype)
        out_THD = table.paged_attention(q_THD, (keys, values), self.batch, call_of(spec, heads.sinks))
        if scales is not None:
            out_THD = (out_THD.float() * per_head(scales.v, spec.heads)).to(out_THD.dtype)
        return out_THD
