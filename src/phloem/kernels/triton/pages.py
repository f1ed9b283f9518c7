"""Rows by index: embedding and selection."""

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
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target[i] = source[index[i]]."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < features
    chosen = tl.load(index + row).to(tl.int64)
    value = tl.load(source + chosen * stride_source + col, mask=keep, other=0.0)
    if SCALED:
        value = (value.to(tl.float32) * scale).to(target.dtype.element_ty)
    tl.store(target + row * stride_target + col, value, mask=keep)


def _copy(source: Tensor, target: Tensor, index: Tensor, scale: float = 1.0) -> None:
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
        SCALED=scale != 1.0,
        BLOCK=block,
    )


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[T, N], index[L] -> [L, N]."""
    out = torch.empty((index.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    _copy(x, out, index)
    return out


def embedding(ids_T: Tensor, weight_VN: Tensor, scale: float) -> Tensor:
    """Rows of the table, times `scale` rounded to the table's type."""
    out = torch.empty((ids_T.shape[0], weight_VN.shape[1]), dtype=weight_VN.dtype, device=weight_VN.device)
    rounded = 1.0 if scale == 1.0 else float(torch.tensor(scale, dtype=weight_VN.dtype))
    _copy(weight_VN, out, ids_T, rounded)
    return out
