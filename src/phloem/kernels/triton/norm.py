"""RMSNorm, alone, with the residual sum before it, and with float8 behind it.

One row's result depends on that row alone (batch-invariant).
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton._base import ceil_div, fp8_limit, power_of_2
from phloem.kernels.triton.early import await_previous, early

GROUP = 128


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x,
    residual,
    weight,
    out,
    total,
    rows,
    inner,
    stride_x_outer,
    stride_x_inner,
    stride_r_outer,
    stride_r_inner,
    features,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    keep = (row < rows)[:, None] & (col < features)[None, :]
    outer = (row // inner).to(tl.int64)
    within = row % inner
    at_x = (outer * stride_x_outer + within * stride_x_inner)[:, None] + col[None, :]
    at_out = row.to(tl.int64)[:, None] * features + col[None, :]
    wide = tl.load(x + at_x, mask=keep, other=0.0).to(tl.float32)
    if ADD:
        at_r = (outer * stride_r_outer + within * stride_r_inner)[:, None] + col[None, :]
        wide += tl.load(residual + at_r, mask=keep, other=0.0).to(tl.float32)
        # The norm is of the sum as it is stored, rounded, so that a later reader of the residual sees the same value.
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + at_out, rounded, mask=keep)
        wide = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / features + eps)
    scale = tl.load(weight + col, mask=col < features, other=0.0).to(tl.float32)
    tl.store(out + at_out, (wide * inverse[:, None] * scale[None, :]).to(out.dtype.element_ty), mask=keep)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor) -> None:
    features = x.shape[-1]
    inner = x.shape[1] if x.dim() == 3 else 1
    rows = x.shape[0] * inner
    if rows == 0:
        return
    block = power_of_2(features)
    # Tile and warps follow from the width alone: a row is summed in the same order whatever the batch.
    per_program = max(1, 1024 // block)
    other = x if residual is None else residual
    _rms_norm[(ceil_div(rows, per_program),)](
        x,
        other,
        weight,
        out,
        total,
        rows,
        inner,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        other.stride(0),
        other.stride(1) if x.dim() == 3 else 0,
        features,
        eps,
        ADD=residual is not None,
        ROWS=per_program,
        BLOCK=block,
        num_warps=min(max(block // 512, 4), 16),
        **early(x),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, N] or [T, H, D] -> the same shape; norm over the last axis in float32."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), both read and written once."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, eps, out, total)
    return out, total


@triton.jit
def _rms_norm_fp8(
    x,
    residual,
    weight,
    out,
    step,
    total,
    stride_x,
    stride_r,
    features,
    groups,
    eps,
    ADD: tl.constexpr,
    GROUPED: tl.constexpr,
    LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: `_rms_norm`, then `_quantise_row`, or with GROUPED `_quantise_groups`, of what it gives."""
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    keep = col < features
    value = tl.load(x + row * stride_x + col, mask=keep, other=0.0)
    wide = value.to(tl.float32)
    if ADD:
        wide += tl.load(residual + row * stride_r + col, mask=keep, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + row * features + col, rounded, mask=keep)
        wide = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / features + eps)
    scale = tl.load(weight + col, mask=keep, other=0.0).to(tl.float32)
    # Rounded as a norm that stands alone rounds it: where float8 begins does not change what is computed.
    wide = (wide * inverse * scale).to(value.dtype).to(tl.float32)
    if GROUPED:
        group = tl.arange(0, BLOCK // GROUP)
        parts = tl.reshape(wide, [BLOCK // GROUP, GROUP])
        most = tl.maximum(tl.max(tl.abs(parts), axis=1), 1e-10) / LIMIT
        tl.store(step + row * groups + group, most, mask=group < groups)
        wide = tl.reshape(parts / most[:, None], [BLOCK])
    else:
        whole = tl.maximum(tl.max(tl.abs(wide), axis=0), 1e-10) / LIMIT
        tl.store(step + row, whole)
        wide = wide / whole
    wide = tl.minimum(tl.maximum(wide, -LIMIT), LIMIT)
    tl.store(out + row * features + col, wide.to(out.dtype.element_ty), mask=keep)


def rms_norm_fp8(
    x_TN: Tensor, residual_TN: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, *, grouped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x (+ residual) in float8 with its scales, [T] or with `grouped` [T, N / 128]; and the sum."""
    tokens, features = x_TN.shape
    groups = ceil_div(features, GROUP)
    out = torch.empty((tokens, features), dtype=dtype, device=x_TN.device)
    step = torch.empty((tokens, groups) if grouped else (tokens,), dtype=torch.float32, device=x_TN.device)
    total = x_TN if residual_TN is None else torch.empty(x_TN.shape, dtype=x_TN.dtype, device=x_TN.device)
    if tokens:
        block = max(GROUP, power_of_2(features))
        other = x_TN if residual_TN is None else residual_TN
        _rms_norm_fp8[(tokens,)](
            *(x_TN, other, weight, out, step, total, x_TN.stride(0), other.stride(0), features, groups, eps),
            ADD=residual_TN is not None,
            GROUPED=grouped,
            LIMIT=fp8_limit(dtype),
            GROUP=GROUP,
            BLOCK=block,
            num_warps=min(max(block // 512, 4), 16),
            **early(x_TN),
        )
    return out, step, total
