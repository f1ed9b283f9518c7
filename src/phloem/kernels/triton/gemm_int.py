"""Weight-only GEMM: activations in their own type, weights in int4 with a scale per group.

Weights are widened in registers, so a step reads an eighth of the bytes of float32. Packing: byte j of a group of G
weights holds element j in its low nibble and element j + G / 2 in its high one, so both halves are contiguous in x. A
nibble n means (n - zero) * scale.
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

from phloem.kernels.triton._base import ceil_div, power_of_2, split_target, stages, sum_splits
from phloem.kernels.triton._device import multiprocessors


@triton.jit
def _raised(code, like):
    """Codes 0 to 15 as 16-bit floats that are larger by `_raise_of`: the last bits of a mantissa, which no conversion
    has to be paid for."""
    if like.dtype == tl.bfloat16:
        return (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)


@triton.jit
def _raise_of(like):
    if like.dtype == tl.bfloat16:
        return 128.0
    else:
        return 1024.0


@triton.jit(do_not_specialize=["tokens", "per_split"])
def _gemm_int4(
    x,
    packed,
    scale,
    zero,
    out,
    tokens,
    features_out,
    groups,
    per_split,
    stride_x,
    stride_w,
    stride_s,
    stride_os,
    stride_ot,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One group of features a turn: its low nibbles meet the first half of x's group, its high ones the second."""
    HALF: tl.constexpr = GROUP // 2
    col = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    k = tl.arange(0, HALF)
    rows, cols = token < tokens, col < features_out
    at_x = x + token.to(tl.int64)[:, None] * stride_x + k[None, :]
    at_w = packed + col.to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for group in range(split * per_split, tl.minimum(groups, (split + 1) * per_split)):
        low = tl.load(at_x + group * GROUP, mask=rows[:, None], other=0.0)
        high = tl.load(at_x + group * GROUP + HALF, mask=rows[:, None], other=0.0)
        both = tl.load(at_w + group * HALF, mask=cols[None, :], other=0)
        step = tl.load(scale + col * stride_s + group, mask=cols, other=0.0).to(tl.float32)
        origin = tl.full([BLOCK_M], 8.0, tl.float32)
        if HAS_ZERO:
            origin = tl.load(zero + col * stride_s + group, mask=cols, other=0.0).to(tl.float32)
        if low.dtype == tl.float32:
            first = (both & 15).to(tl.float32) - origin[None, :]
            second = (both >> 4).to(tl.float32) - origin[None, :]
            part = tl.dot(low, first, input_precision="ieee")
            part = tl.dot(high, second, part, input_precision="ieee")
        else:
            # Exact in half types: the sum of x takes off what codes are too large by, and the zero point.
            part = tl.dot(low, _raised(both & 15, low))
            part = tl.dot(high, _raised(both >> 4, low), part)
            whole = tl.sum(low.to(tl.float32) + high.to(tl.float32), axis=1)
            part -= whole[:, None] * (origin + _raise_of(low))[None, :]
        acc += part * step[None, :]
    at = out + split.to(tl.int64) * stride_os + token.to(tl.int64)[:, None] * stride_ot + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=rows[:, None] & cols[None, :])


def _plan(
    x_TN: Tensor, outputs: int, turns: int, splits: int | None, block_m: int = 64, each: int = 1
) -> tuple[int, int, int, int]:
    """(tokens of a tile, outputs of a tile, turns of a split, splits), for `each` programs a multiprocessor."""
    block_t = max(16, min(64, power_of_2(x_TN.shape[0])))
    tiles = ceil_div(outputs, block_m) * ceil_div(x_TN.shape[0], block_t)
    if splits is None:
        splits = max(1, min(turns // 4, each * multiprocessors(x_TN) // tiles))
    per_split = ceil_div(turns, max(splits, 1))
    return block_t, block_m, per_split, ceil_div(turns, per_split)


def pack_int4(values_MN: Tensor, group: int) -> Tensor:
    """Values 0 to 15 [M, N] -> uint8 [M, N / 2] in this file's order; N must be a multiple of the group."""
    halves = values_MN.to(torch.uint8).unflatten(1, (-1, 2, group // 2))
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1).contiguous()


def int4_gemm(
    x_TN: Tensor,
    packed: Tensor,
    scale_MG: Tensor,
    zero_MG: Tensor | None = None,
    bias_M: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """x [T, N], packed int4 [M, N / 2] with scales (and zero points; 8 without) [M, N / group] -> [T, M]."""
    tokens, features = x_TN.shape
    outputs, groups = scale_MG.shape
    group = features // groups
    if group * groups != features or group < 32 or group & (group - 1):
        raise ValueError(f"int4 groups of {features / groups:g} features: a power of two from 32 up is needed")
    out = torch.empty((tokens, outputs), dtype=x_TN.dtype, device=x_TN.device)
    if tokens == 0:
        return out
    # Wide tiles have fewer instructions a byte of the weight; those of few rows have to be several at once.
    cut = (64, 1) if x_TN.dtype == torch.float32 else (128, 3 if tokens <= 16 else 2)
    block_t, block_m, per_split, splits = _plan(x_TN, outputs, groups, splits, *cut)
    target, direct = split_target(out, splits, bias_M)
    _gemm_int4[(ceil_div(outputs, block_m), ceil_div(tokens, block_t), splits)](
        *(x_TN, packed, scale_MG, zero_MG if zero_MG is not None else scale_MG, target, tokens, outputs, groups),
        *(per_split, x_TN.stride(0), packed.stride(0), scale_MG.stride(0), *target.stride()[:2]),
        GROUP=group,
        HAS_ZERO=zero_MG is not None,
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        num_warps=4,
        num_stages=stages(3),
    )
    return out if direct else sum_splits(target, bias_M, out)
