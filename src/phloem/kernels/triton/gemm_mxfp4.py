"""Products of activations in their own type with dense weights in 4-bit floats (MXFP4), widened in registers.

A tile is turned, as in `grouped.py`: rows of the weight by tokens.
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
from phloem.kernels.triton.early import await_previous, early
from phloem.kernels.triton.nibbles import FLOAT_GROUP, MXFP4, scales_at, warp_groups, widened_halves

BLOCK_K = 128


@triton.jit(do_not_specialize=["tokens", "per_split"])
def _gemm_mxfp4(
    x,
    packed,
    scale,
    out,
    tokens,
    features_in,
    features_out,
    per_split,
    stride_x,
    stride_w,
    stride_s,
    stride_os,
    stride_ot,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of output features, blocks of tokens, splits). `per_split`: turns of a split."""
    await_previous(PDL)
    HALF: tl.constexpr = GROUP // 2
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    TYPE: tl.constexpr = x.dtype.element_ty
    col = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    rows, cols = token < tokens, col < features_out
    group, within = tl.arange(0, GROUPS), tl.arange(0, HALF)
    place = tl.arange(0, BLOCK_K // 2)
    k = place // HALF * GROUP + place % HALF
    row = col.to(tl.int64)
    at_x = x + token.to(tl.int64)[None, :] * stride_x + k[:, None]
    at_w = packed + row[:, None, None] * stride_w + (group[None, :, None] * HALF + within[None, None, :])
    acc = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    end = tl.minimum(features_in, (split + 1) * per_split * BLOCK_K)
    for start in range(split * per_split * BLOCK_K, end, BLOCK_K):
        step, origin = scales_at(scale + col, scale + col, start, end, cols, group, stride_s, False, GROUP)
        some = (start + k < end)[:, None] & rows[None, :]
        low = tl.load(at_x + start, mask=some, other=0.0)
        high = tl.load(at_x + start + HALF, mask=some, other=0.0)
        whole = cols[:, None] & (start + group * GROUP < end)[None, :]
        there = tl.broadcast_to(whole[:, :, None], [BLOCK_M, GROUPS, HALF])
        both = tl.load(at_w + start // 2, mask=there, other=0)
        b, c = widened_halves(both, step, origin, WIDTH, False, BLOCK_M, GROUPS, HALF, TYPE)
        acc = tl.dot(b, low, acc, input_precision="ieee")
        acc = tl.dot(c, high, acc, input_precision="ieee")
    done = tl.trans(acc.to(out.dtype.element_ty))
    at = out + split.to(tl.int64) * stride_os + token.to(tl.int64)[:, None] * stride_ot + col[None, :]
    tl.store(at, done, mask=rows[:, None] & cols[None, :])


def mxfp4_gemm(
    x_TN: Tensor, packed: Tensor, scale: Tensor, bias_M: Tensor | None = None, splits: int | None = None
) -> Tensor:
    """x [T, N], packed e2m1 [M, N / 2] with exponents uint8 [1, N / 32, M] (`nibbles.py`) -> [T, M] in x's type."""
    (tokens, features), outputs = x_TN.shape, packed.shape[0]
    out = torch.empty((tokens, outputs), dtype=x_TN.dtype, device=x_TN.device)
    if tokens == 0:
        return out
    wide = x_TN.dtype == torch.float32
    block_t = max(16, min(32 if wide else 128, power_of_2(tokens)))
    large = block_t >= 64 and warp_groups(x_TN.device)
    block_m = 32 if wide else (128 if large else 64)
    block_k = BLOCK_K if large or block_t < 64 else BLOCK_K // 2
    turns = ceil_div(features, block_k)
    tiles = ceil_div(outputs, block_m) * ceil_div(tokens, block_t)
    if splits is None:
        splits = max(1, min(turns // 4, multiprocessors(x_TN) // tiles))
    per_split = ceil_div(turns, splits)
    splits = ceil_div(turns, per_split)
    target, direct = split_target(out, splits, bias_M)
    _gemm_mxfp4[(ceil_div(outputs, block_m), ceil_div(tokens, block_t), splits)](
        *(x_TN, packed, scale, target, tokens, features, outputs, per_split),
        *(x_TN.stride(0), packed.stride(0), scale.stride(1), *target.stride()[:2]),
        WIDTH=MXFP4,
        GROUP=FLOAT_GROUP,
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=8 if block_t >= 64 else 4,
        num_stages=stages(3),
        **early(x_TN),
    )
    return out if direct else sum_splits(target, bias_M, out)
