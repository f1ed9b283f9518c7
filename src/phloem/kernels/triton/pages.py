"""Rows and pages by index: embedding, selection, and the copies between a KV pool and a contiguous buffer."""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton._base import ceil_div, power_of_2


@triton.jit
def _copy_rows(
    source,
    target,
    index,
    stride_source,
    stride_target,
    features,
    scale,
    TO_INDEX: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target[i] = source[index[i]], or with TO_INDEX target[index[i]] = source[i]."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < features
    chosen = tl.load(index + row).to(tl.int64)
    source_row = row if TO_INDEX else chosen
    target_row = chosen if TO_INDEX else row
    value = tl.load(source + source_row * stride_source + col, mask=keep, other=0.0)
    if SCALED:
        value = (value.to(tl.float32) * scale).to(target.dtype.element_ty)
    tl.store(target + target_row * stride_target + col, value, mask=keep)


def _copy(source: Tensor, target: Tensor, index: Tensor, to_index: bool, scale: float = 1.0) -> None:
    """Both as [rows, features] views."""
    features = source.shape[1]
    if index.shape[0] == 0:
        return
    block = min(2048, power_of_2(features))
    _copy_rows[(index.shape[0], ceil_div(features, block))](
        source,
        target,
        index,
        source.stride(0),
        target.stride(0),
        features,
        scale,
        TO_INDEX=to_index,
        SCALED=scale != 1.0,
        BLOCK=block,
    )


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[T, N], index[L] -> [L, N]."""
    out = torch.empty((index.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    _copy(x, out, index, False)
    return out


def embedding(ids_T: Tensor, weight_VN: Tensor, scale: float) -> Tensor:
    """Rows of the table, times `scale` rounded to the table's type."""
    out = torch.empty((ids_T.shape[0], weight_VN.shape[1]), dtype=weight_VN.dtype, device=weight_VN.device)
    rounded = 1.0 if scale == 1.0 else float(torch.tensor(scale, dtype=weight_VN.dtype))
    _copy(weight_VN, out, ids_T, False, rounded)
    return out


def _as_bytes(pages: Tensor) -> Tensor:
    """Pages as rows of the widest integers that their size allows: a copy does not care what the bytes mean."""
    flat = pages.view(torch.uint8).flatten(1)
    return flat.view(torch.int32) if flat.shape[1] % 4 == 0 else flat


def gather_pages(cache: Tensor, pages: Tensor) -> Tensor:
    """cache[pages, K, S, D], page ids [n] -> their contents [n, K, S, D], contiguous."""
    out = torch.empty((pages.shape[0], *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
    _copy(_as_bytes(cache), _as_bytes(out), pages, False)
    return out


def scatter_pages(cache: Tensor, pages: Tensor, contents: Tensor) -> None:
    """cache[pages[i]] = contents[i]; page ids must differ."""
    _copy(_as_bytes(contents.contiguous()), _as_bytes(cache), pages, True)
