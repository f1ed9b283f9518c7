"""Paged attention of the native table; the method is in csrc/cpu/each/attention.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels._native_basic import cache_stride, check_fours, heads_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.ops import PagedBatch

SPLIT_TOKENS = 256  # as in attention_args.h: one decoding row is split over at least so many cached tokens
MAX_SPLITS = 16
BLOCK_ROWS = 96  # query rows of a task
REGION = 1_000_000  # "work" that always shares the op out: how much there is, only seq_lens tells


def ops(rt: Runtime) -> dict[str, Any]:
    call, empty = rt.call, rt.empty
    HANDLES = {torch.bfloat16: rt.op("attention_bf16"), torch.int8: rt.op("attention_int8")}

    def paged_attention(
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: PagedBatch,
        scale: float,
        window: int,
        cap: float,
        sinks_H: Tensor | None,
    ) -> Tensor:
        _, heads, size = q_THD.shape
        _, kv_heads, page_size, width = k_cache.shape
        rows, pages = batch.page_table.shape
        handle = HANDLES.get(k_cache.dtype)
        if k_cache.dtype == torch.int8:
            check_fours(size, page_size)
        if handle is None or width != size + 4 * (k_cache.dtype == torch.int8) or heads % kv_heads:
            raise ValueError(f"cache {k_cache.dtype} {list(k_cache.shape)} does not fit queries {list(q_THD.shape)}")
        _check(batch, rows)
        if sinks_H is not None and (sinks_H.dtype != torch.float32 or not sinks_H.is_contiguous()):
            raise TypeError("sinks must be contiguous float32")
        splits = max(1, min(MAX_SPLITS, -(-pages * page_size // SPLIT_TOKENS)))
        stride = scratch_floats(size, heads // kv_heads)
        out = empty(q_THD.shape)
        partial = empty((rows * heads * splits * (size + 2) if splits > 1 else 1,))
        scratch = empty((rt.library.threads() * stride,))
        call(
            handle, REGION,
            q_THD.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), batch.query_start.data_ptr(),
            batch.seq_lens.data_ptr(), batch.page_table.data_ptr(), None if sinks_H is None else sinks_H.data_ptr(),
            partial.data_ptr(), scratch.data_ptr(), rows, heads, kv_heads, size, page_size, batch.page_table.stride(0),
            cache_stride(k_cache, v_cache), *heads_of(q_THD), splits, stride, window, scale, cap,
        )  # fmt: skip
        return out

    return {"paged_attention": paged_attention}


def scratch_floats(size: int, group: int) -> int:
    """Floats that a thread needs for packed queries, keys, values and results; an upper bound for every level."""
    wide, rows = -(-size // 16) * 16, max(BLOCK_ROWS, group)
    return (2 * rows + 192) * wide + 18 * rows + 1024


def _check(batch: PagedBatch, rows: int) -> None:
    start, lens, table = batch.query_start, batch.seq_lens, batch.page_table
    if not start.dtype == lens.dtype == table.dtype == torch.int32:
        raise TypeError("query_start, seq_lens and page_table must be int32")
    if start.shape != (rows + 1,) or lens.shape != (rows,) or (table.stride(1) != 1 and table.shape[1] > 1):
        raise ValueError("query_start, seq_lens and page_table must agree on the number of rows")
