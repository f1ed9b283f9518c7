"""From logits to tokens in the native table; the method is in csrc/cpu/each/sample.cpp. Scratch is per thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime

MAX_VOCAB = 1 << 20


def ops(rt: Runtime) -> dict[str, Any]:
    return {**_scans(rt), **_draws(rt)}


def _logits(logits_LV: Tensor) -> tuple[int, int, int]:
    """Rows, vocabulary and row stride of float32 logits."""
    rows, vocab = logits_LV.shape
    row, last = logits_LV.stride()
    if logits_LV.dtype != torch.float32 or (last != 1 and vocab > 1) or not 0 < vocab <= MAX_VOCAB:
        raise ValueError(f"logits must be float32 rows of 1 to {MAX_VOCAB}, not {logits_LV.dtype} {[rows, vocab]}")
    return rows, vocab, row


def _scans(rt: Runtime) -> dict[str, Any]:
    call, empty = rt.call, rt.empty
    ARGMAX, LOGSUMEXP, MASK = rt.op("argmax"), rt.op("logsumexp"), rt.op("mask_tokens")

    def argmax(logits_LV: Tensor) -> Tensor:
        rows, vocab, stride = _logits(logits_LV)
        out = empty((rows,), torch.int32)
        call(ARGMAX, work(rows, vocab // 8), logits_LV.data_ptr(), out.data_ptr(), rows, vocab, stride)
        return out

    def logsumexp(logits_LV: Tensor) -> Tensor:
        rows, vocab, stride = _logits(logits_LV)
        out = empty((rows,))
        call(LOGSUMEXP, work(rows, vocab // 3), logits_LV.data_ptr(), out.data_ptr(), rows, vocab, stride)
        return out

    def mask_tokens_(logits_LV: Tensor, rows_M: Tensor, mask_MW: Tensor) -> None:
        rows, vocab, stride = _logits(logits_LV)
        count, words = mask_MW.shape
        if not (rows_M.dtype == mask_MW.dtype == torch.int32 and rows_M.shape == (count,)):
            raise ValueError("rows and mask must be int32, one row number for each mask")
        if not (rows_M.is_contiguous() and mask_MW.is_contiguous()):
            raise ValueError("rows and mask must be contiguous")
        if count and not 0 <= int(rows_M.min()) <= int(rows_M.max()) < rows:
            raise ValueError(f"mask rows must be 0 to {rows - 1}")
        pointers = (logits_LV.data_ptr(), rows_M.data_ptr(), mask_MW.data_ptr())
        call(MASK, work(count, vocab // 4), *pointers, count, vocab, stride, words)

    return {"argmax": argmax, "logsumexp": logsumexp, "mask_tokens_": mask_tokens_}


def work(rows: int, nanoseconds: int) -> int:
    """One row runs on one thread, whatever it costs."""
    return 0 if rows == 1 else rows * nanoseconds


def _draws(rt: Runtime) -> dict[str, Any]:
    call, empty = rt.call, rt.empty
    TOP_K, SAMPLE = rt.op("top_k"), rt.op("sample")
    KINDS = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)

    def top_k(logits_LV: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows, vocab, stride = _logits(logits_LV)
        if not 0 < k <= vocab:
            raise ValueError(f"k must be 1 to {vocab}, not {k}")
        values, ids = empty((rows, k)), empty((rows, k), torch.int32)
        scratch = empty((rt.library.threads(), vocab), torch.int64)
        pointers = (logits_LV.data_ptr(), values.data_ptr(), ids.data_ptr(), scratch.data_ptr())
        call(TOP_K, work(rows, vocab // 2), *pointers, rows, vocab, stride, k)
        return values, ids

    def sample(
        logits_LV: Tensor,
        temperature_L: Tensor,
        top_k_L: Tensor,
        top_p_L: Tensor,
        min_p_L: Tensor,
        seeds_L: Tensor,
        positions_L: Tensor,
    ) -> Tensor:
        rows, vocab, stride = _logits(logits_LV)
        columns = (temperature_L, top_k_L, top_p_L, min_p_L, seeds_L, positions_L)
        for column, kind in zip(columns, KINDS, strict=True):
            if column.dtype != kind or column.shape != (rows,) or not column.is_contiguous():
                raise ValueError(f"expected contiguous {kind} [{rows}], not {column.dtype} {list(column.shape)}")
        threads, out = rt.library.threads(), empty((rows,), torch.int32)
        weights, keys = empty((threads, vocab)), empty((threads, 2, vocab), torch.int64)
        pointers = [column.data_ptr() for column in (*columns, out, weights, keys)]
        call(SAMPLE, work(rows, vocab), logits_LV.data_ptr(), *pointers, rows, vocab, stride)
        return out

    return {"top_k": top_k, "sample": sample}
