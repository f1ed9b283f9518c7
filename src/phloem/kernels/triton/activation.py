"""Elementwise ops: gated activations, sum, soft cap."""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton._base import activate, ceil_div, power_of_2, rows_2d, tanh
from phloem.kernels.triton.early import await_previous, early

SILU, GELU_TANH = 0, 1


@triton.jit
def _gate_and_mul(x, out, stride_x, features, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < features
    gate = tl.load(x + row * stride_x + col, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + features + col, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * features + col, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _add(x, y, out, stride_x, stride_y, features, BLOCK: tl.constexpr, PDL: tl.constexpr):
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < features
    left = tl.load(x + row * stride_x + col, mask=keep, other=0.0).to(tl.float32)
    right = tl.load(y + row * stride_y + col, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * features + col, (left + right).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _softcap(x, out, stride_x, features, cap, BLOCK: tl.constexpr, PDL: tl.constexpr):
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < features
    wide = tl.load(x + row * stride_x + col, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * features + col, (tanh(wide / cap) * cap).to(out.dtype.element_ty), mask=keep)


def _grid(rows: int, features: int) -> tuple[tuple[int, int], int]:
    block = min(1024, power_of_2(features))
    return (rows, ceil_div(features, block)), block


def _gated(x: Tensor, kind: int) -> Tensor:
    features = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)
    flat = rows_2d(x)
    if flat.shape[0]:
        grid, block = _grid(flat.shape[0], features)
        _gate_and_mul[grid](flat, out, flat.stride(0), features, KIND=kind, BLOCK=block, **early(flat))
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    """[..., 2N] (gate, up) -> silu(gate) * up [..., N]."""
    return _gated(x, SILU)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """[..., 2N] (gate, up) -> gelu(gate) * up [..., N], GELU in its tanh form."""
    return _gated(x, GELU_TANH)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, of equal shapes."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = rows_2d(x), rows_2d(y)
    if left.shape[0]:
        grid, block = _grid(left.shape[0], left.shape[1])
        _add[grid](left, right, out, left.stride(0), right.stride(0), left.shape[1], BLOCK=block, **early(out))
    return out


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat = rows_2d(x)
    if flat.shape[0]:
        grid, block = _grid(flat.shape[0], flat.shape[1])
        _softcap[grid](flat, out, flat.stride(0), flat.shape[1], cap, BLOCK=block, **early(flat))
    return out
