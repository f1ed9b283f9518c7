"""From logits to tokens in the native table; the method is in csrc/cpu/each/sample.cpp. Scratch is per thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.calls import Draw


def ops(rt: Runtime) -> dict[str, Any]:
    return {**_scans(rt), **_draws(rt)}


def _logits(logits_LV: Tensor, most: int) -> tuple[int, int, int]:
    """Rows, vocabulary and row stride of float32 logits."""
    rows, vocab = logits_LV.shape
    row, last = logits_LV.stride()
    if logits_LV.dtype != torch.float32 or (last != 1 and vocab > 1) or not 0 < vocab <= most:
        raise ValueError(f"logits must be float32 rows of 1 to {most}, not {logits_LV.dtype} {[rows, vocab]}")
    return rows, vocab, row


def _scans(rt: Runtime) -> dict[str, Any]:
    call, empty = rt.call, rt.empty
    MAX_VOCAB = rt.constant("sample.kMaxVocab")
    ARGMAX, LOGSUMEXP, MASK = rt.op("argmax"), rt.op("logsumexp"), rt.op("mask_tokens")

    def argmax(logits_LV: Tensor) -> Tensor:
        rows, vocab, stride = _logits(logits_LV, MAX_VOCAB)
        out = empty((rows,), torch.int32)
        cost, logits = work(rows, vocab // 8), logits_LV.data_ptr()
        call(ARGMAX, cost, logits=logits, out=out.data_ptr(), rows=rows, vocab=vocab, stride=stride)
        return out

    def logsumexp(logits_LV: Tensor) -> Tensor:
        rows, vocab, stride = _logits(logits_LV, MAX_VOCAB)
        out = empty((rows,))
        cost, logits = work(rows, vocab // 3), logits_LV.data_ptr()
        call(LOGSUMEXP, cost, logits=logits, out=out.data_ptr(), rows=rows, vocab=vocab, stride=stride)
        return out

    def mask_tokens_(logits_LV: Tensor, rows_M: Tensor, mask_MW: Tensor) -> None:
        rows, vocab, stride = _logits(logits_LV, MAX_VOCAB)
        count, words = mask_MW.shape
        if not (rows_M.dtype == mask_MW.dtype == torch.int32 and rows_M.shape == (count,)):
            raise ValueError("rows and mask must be int32, one row number for each mask")
        if not (rows_M.is_contiguous() and mask_MW.is_contiguous()):
            raise ValueError("rows and mask must be contiguous")
        if count and not 0 <= int(rows_M.min()) <= int(rows_M.max()) < rows:
            raise ValueError(f"mask rows must be 0 to {rows - 1}")
        call(
            MASK, work(count, vocab // 4), logits=logits_LV.data_ptr(), rows=rows_M.data_ptr(), mask=mask_MW.data_ptr(),
            count=count, vocab=vocab, stride=stride, words=words,
        )  # fmt: skip

    return {"argmax": argmax, "logsumexp": logsumexp, "mask_tokens_": mask_tokens_}


def work(rows: int, nanoseconds: int) -> int:
    """One row runs on one thread, whatever it costs."""
    return 0 if rows == 1 else rows * nanoseconds


def _draws(rt: Runtime) -> dict[str, Any]:
    call, empty = rt.call, rt.empty
    MAX_VOCAB = rt.constant("sample.kMaxVocab")
    TOP_K, SAMPLE = rt.op("top_k"), rt.op("sample")
    KINDS = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)

    def top_k(logits_LV: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows, vocab, stride = _logits(logits_LV, MAX_VOCAB)
        if not 0 < k <= vocab:
            raise ValueError(f"k must be 1 to {vocab}, not {k}")
        values, ids = empty((rows, k)), empty((rows, k), torch.int32)
        scratch = empty((rt.library.threads(), vocab), torch.int64)
        call(
            TOP_K, work(rows, vocab // 2), logits=logits_LV.data_ptr(), values=values.data_ptr(), ids=ids.data_ptr(),
            scratch=scratch.data_ptr(), rows=rows, vocab=vocab, stride=stride, k=k,
        )  # fmt: skip
        return values, ids

    def sample(logits_LV: Tensor, draw: Draw) -> Tensor:
        rows, vocab, stride = _logits(logits_LV, MAX_VOCAB)
        columns = (draw.temperature, draw.top_k, draw.top_p, draw.min_p, draw.seeds, draw.positions)
        for column, kind in zip(columns, KINDS, strict=True):
            if column.dtype != kind or column.shape != (rows,) or not column.is_contiguous():
                raise ValueError(f"expected contiguous {kind} [{rows}], not {column.dtype} {list(column.shape)}")
        threads, out = rt.library.threads(), empty((rows,), torch.int32)
        weights, keys = empty((threads, vocab)), empty((threads, 2, vocab), torch.int64)
        call(
            SAMPLE, work(rows, vocab), logits=logits_LV.data_ptr(), rows=rows, vocab=vocab, stride=stride,
            temperature=draw.temperature.data_ptr(), top_k=draw.top_k.data_ptr(), top_p=draw.top_p.data_ptr(),
            min_p=draw.min_p.data_ptr(), seeds=draw.seeds.data_ptr(), positions=draw.positions.data_ptr(),
            out=out.data_ptr(), weights=weights.data_ptr(), keys=keys.data_ptr(),
        )  # fmt: skip
        return out

    return {"top_k": top_k, "sample": sample}
