"""Attention of the native table, over pages and of packed texts; the methods are in csrc/cpu/each/attention.cpp and
packed_attention.cpp."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels._native_basic import CACHES, cache_stride, check_fours, heads_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.calls import AttentionCall, Cache, PagedBatch

MAX_SPLITS = 16
REGION = 1_000_000  # "work" that always shares the op out: how much there is, only seq_lens tells


def ops(rt: Runtime) -> dict[str, Any]:
    call, empty = rt.call, rt.empty
    HANDLES = {kind: rt.op(f"attention_{name}") for kind, name in CACHES.items()}
    SPLIT_TOKENS = rt.constant("attention.kSplitTokens")  # one decoding row is split over at least so many
    scratch_floats = scratch_of(rt)

    def paged_attention(q_THD: Tensor, cache: Cache, batch: PagedBatch, how: AttentionCall) -> Tensor:
        _, heads, size = q_THD.shape
        k_cache, v_cache = cache
        _, kv_heads, page_size, width = k_cache.shape
        rows, pages = batch.page_table.shape
        handle, sinks_H = HANDLES.get(k_cache.dtype), how.sinks
        if not how.causal or how.chunk or (how.block and how.window):
            raise ValueError("native attention is causal, or causal by blocks without a window; it has no chunks")
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
        q_token, q_head = heads_of(q_THD)
        call(
            handle, REGION, q=q_THD.data_ptr(), q_token=q_token, q_head=q_head, out=out.data_ptr(),
            k_cache=k_cache.data_ptr(), v_cache=v_cache.data_ptr(), page_stride=cache_stride(k_cache, v_cache),
            query_start=batch.query_start.data_ptr(), seq_lens=batch.seq_lens.data_ptr(),
            page_table=batch.page_table.data_ptr(), pages_per_row=batch.page_table.stride(0),
            rows=rows, heads=heads, kv_heads=kv_heads, head_size=size, page_size=page_size,
            partial=partial.data_ptr(), max_splits=splits, scratch=scratch.data_ptr(), scratch_stride=stride,
            scale=how.scale, window=how.window, block=how.block, softcap=how.softcap,
            sinks=None if sinks_H is None else sinks_H.data_ptr(),
        )  # fmt: skip
        return out

    return {"paged_attention": paged_attention, **_packed(rt)}


def _packed(rt: Runtime) -> dict[str, Any]:
    call, empty, ATTEND, SCRATCH = rt.call, rt.empty, rt.op("packed_attention"), rt.op("packed_attention_scratch")

    @cache
    def scratch_floats(size: int, values: int, group: int) -> int:
        found = (ctypes.c_int64 * 1)()
        rt.library.ask(SCRATCH, head_size=size, value_size=values, group=group, floats=ctypes.addressof(found))
        return found[0]

    def packed_attention(
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKV: Tensor,
        starts: Tensor,
        how: AttentionCall,
        distances: Tensor | None = None,
    ) -> Tensor:
        tokens, heads, size = q_THD.shape
        kv_heads, values, rows = k_TKD.shape[1], v_TKV.shape[2], len(starts) - 1
        if k_TKD.shape != (tokens, kv_heads, size) or v_TKV.shape[:2] != k_TKD.shape[:2] or heads % kv_heads:
            shapes = ", ".join(str(list(x.shape)) for x in (q_THD, k_TKD, v_TKV))
            raise ValueError(f"queries, keys and values of packed texts do not fit: {shapes}")
        (q_token, q_head), (k_token, k_head), (v_token, v_head) = (heads_of(x) for x in (q_THD, k_TKD, v_TKV))
        longest = _longest(starts, tokens)
        for name, one in (("sinks", how.sinks), ("distances", distances)):
            if one is not None and (one.dtype != torch.float32 or not one.is_contiguous() or len(one) != heads):
                raise TypeError(f"{name} must be contiguous float32, an entry for each of {heads} heads")
        if distances is not None and distances.shape[1] < 2 * longest - 1:
            raise ValueError(f"{list(distances.shape)} distances are too few for the longest text")
        out = empty((tokens, heads, values))
        stride = scratch_floats(size, values, heads // kv_heads)
        scratch = empty((rt.library.threads() * stride,))
        work = tokens * tokens // max(1, rows) * heads * (size + values) // 16
        call(
            ATTEND, work, q=q_THD.data_ptr(), k=k_TKD.data_ptr(), v=v_TKV.data_ptr(), out=out.data_ptr(),
            starts=starts.data_ptr(), sinks=None if how.sinks is None else how.sinks.data_ptr(),
            distances=None if distances is None else distances.data_ptr(), scratch=scratch.data_ptr(), rows=rows,
            heads=heads, kv_heads=kv_heads, head_size=size, value_size=values, q_token=q_token, q_head=q_head,
            k_token=k_token, k_head=k_head, v_token=v_token, v_head=v_head,
            distance_head=0 if distances is None else distances.shape[1], scratch_stride=stride, causal=how.causal,
            window=how.window, chunk=how.chunk, block=how.block, scale=how.scale, softcap=how.softcap,
        )  # fmt: skip
        return out

    return {"packed_attention": packed_attention}


def _longest(starts: Tensor, tokens: int) -> int:
    """Of packed texts, which are what the op will believe."""
    if starts.dtype != torch.int32 or starts.dim() != 1 or not starts.is_contiguous() or starts.device.type != "cpu":
        raise TypeError("starts of packed texts must be contiguous int32 on the host")
    places = starts.numpy()
    lengths = places[1:] - places[:-1]
    if len(places) < 2 or places[0] != 0 or places[-1] != tokens or lengths.min() < 0:
        raise ValueError(f"starts of packed texts must rise from 0 to the number of tokens, {tokens}")
    return int(lengths.max())


def scratch_of(rt: Runtime) -> Callable[[int, int], int]:
    """(head size, query heads of a kv head) -> floats that a thread needs for packed queries, keys and values."""
    handle = rt.op("attention_scratch")

    @cache
    def floats(size: int, group: int) -> int:
        found = (ctypes.c_int64 * 1)()
        rt.library.ask(handle, head_size=size, group=group, floats=ctypes.addressof(found))
        return found[0]

    return floats


def _check(batch: PagedBatch, rows: int) -> None:
    start, lens, table = batch.query_start, batch.seq_lens, batch.page_table
    if not start.dtype == lens.dtype == table.dtype == torch.int32:
        raise TypeError("query_start, seq_lens and page_table must be int32")
    if start.shape != (rows + 1,) or lens.shape != (rows,) or (table.stride(1) != 1 and table.shape[1] > 1):
        raise ValueError("query_start, seq_lens and page_table must agree on the number of rows")
