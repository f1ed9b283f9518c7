"""Block-scaled float8 GEMM: y = x wT, where x has a scale per token and 128 features and w one per 128 x 128 block.

The scheme of DeepSeek-V3 (2024): each 128-feature product is scaled as it joins the float32 sum. Few tokens cut the
features into splits, so that more programs read the weights at once; their sums are then added in order. Few tokens
also keep their own type (`few_rows_gemm`): the product waits for the weights, and quantising would be one more launch.
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

from phloem.kernels.triton._base import ceil_div, power_of_2, split_target, stages, sum_splits, widened
from phloem.kernels.triton._device import multiprocessors
from phloem.kernels.triton.early import await_previous, early

GROUP = 128
FEW_ROWS = 16


@triton.jit(do_not_specialize=["tokens", "groups_per_split"])
def _gemm_fp8(
    x,
    weight,
    x_scale,
    weight_scale,
    out,
    tokens,
    features_in,
    features_out,
    groups_per_split,
    stride_x,
    stride_w,
    stride_xs,
    stride_ws,
    stride_os,
    stride_ot,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of output features, blocks of tokens, splits)."""
    await_previous(PDL)
    col = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    k = tl.arange(0, GROUP)
    rows, cols = token < tokens, col < features_out
    at_x = x + token.to(tl.int64)[:, None] * stride_x + k[None, :]
    at_w = weight + col.to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    first = split * groups_per_split
    last = tl.minimum(first + groups_per_split, tl.cdiv(features_in, GROUP))
    for group in range(first, last):
        start = group * GROUP
        some = start + k < features_in
        a = tl.load(at_x + start, mask=rows[:, None] & some[None, :], other=0.0)
        b = tl.load(at_w + start, mask=some[:, None] & cols[None, :], other=0.0)
        row_scale = tl.load(x_scale + token * stride_xs + group, mask=rows, other=0.0)
        col_scale = tl.load(weight_scale + (col // GROUP) * stride_ws + group, mask=cols, other=0.0)
        acc += tl.dot(a, b) * row_scale[:, None] * col_scale[None, :]
    at = out + split.to(tl.int64) * stride_os + token.to(tl.int64)[:, None] * stride_ot + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=rows[:, None] & cols[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _gemm_few(
    x,
    weight,
    weight_scale,
    out,
    tokens,
    features_in,
    features_out,
    groups_per_split,
    stride_x,
    stride_w,
    stride_ws,
    stride_os,
    stride_ot,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of output features, splits). BLOCKS: a scale per 128 x 128 block; else one per output feature."""
    await_previous(PDL)
    col = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    k = tl.arange(0, GROUP)
    rows, cols = token < tokens, col < features_out
    at_x = x + token.to(tl.int64)[:, None] * stride_x + k[None, :]
    at_w = weight + col.to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    first = split * groups_per_split
    last = tl.minimum(first + groups_per_split, tl.cdiv(features_in, GROUP))
    for group in range(first, last):
        start = group * GROUP
        some = start + k < features_in
        a = tl.load(at_x + start, mask=rows[:, None] & some[None, :], other=0.0)
        b = tl.load(at_w + start, mask=some[:, None] & cols[None, :], other=0.0)
        if BLOCKS:
            scale = tl.load(weight_scale + (col // GROUP) * stride_ws + group, mask=cols, other=0.0)
            acc += tl.dot(a, widened(b, a), input_precision="ieee") * scale[None, :]
        else:
            acc = tl.dot(a, widened(b, a), acc, input_precision="ieee")
    if not BLOCKS:
        acc = acc * tl.load(weight_scale + col, mask=cols, other=0.0)[None, :]
    at = out + split.to(tl.int64) * stride_os + token.to(tl.int64)[:, None] * stride_ot + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=rows[:, None] & cols[None, :])


def few_rows_gemm(
    x_TN: Tensor, weight_MN: Tensor, weight_scale: Tensor, bias_M: Tensor | None, splits: int | None = None
) -> Tensor:
    """x [T, N] of up to `FEW_ROWS` tokens, weight [M, N] float8 with scales [M] or [M / 128, N / 128] -> [T, M]."""
    tokens, features = x_TN.shape
    outputs = weight_MN.shape[0]
    out = torch.empty((tokens, outputs), dtype=x_TN.dtype, device=x_TN.device)
    if tokens == 0:
        return out
    # 32 outputs have more instructions a byte than the device's memory leaves time for.
    block_m, groups = 32 if x_TN.dtype == torch.float32 else 64, ceil_div(features, GROUP)
    tiles = ceil_div(outputs, block_m)
    if splits is None:
        # Programs that fill the device four times keep enough loads in flight; a split has four turns at least.
        splits = max(1, min(groups // 4, 4 * multiprocessors(x_TN) // tiles))
    per_split = ceil_div(groups, splits)
    splits = ceil_div(groups, per_split)
    target, direct = split_target(out, splits, bias_M)
    _gemm_few[(tiles, splits)](
        *(x_TN, weight_MN, weight_scale, target, tokens, features, outputs, per_split),
        *(x_TN.stride(0), weight_MN.stride(0), weight_scale.stride(0), *target.stride()[:2]),
        BLOCKS=weight_scale.dim() == 2,
        GROUP=GROUP,
        BLOCK_T=16,
        BLOCK_M=block_m,
        num_warps=4,
        num_stages=2 if x_TN.dtype == torch.float32 else stages(4),
        **early(x_TN),
    )
    return out if direct else sum_splits(target, bias_M, out)


def block_scaled_gemm(
    x_TN: Tensor,
    x_scale: Tensor,
    weight_MN: Tensor,
    weight_scale: Tensor,
    bias_M: Tensor | None,
    dtype: torch.dtype,
    splits: int | None = None,
) -> Tensor:
    """x [T, N] float8 with scales [T, N / 128], weight [M, N] float8 with [M / 128, N / 128] -> [T, M] in `dtype`."""
    tokens, features = x_TN.shape
    outputs = weight_MN.shape[0]
    out = torch.empty((tokens, outputs), dtype=dtype, device=x_TN.device)
    if tokens == 0:
        return out
    block_t = max(16, min(128, power_of_2(tokens)))
    block_m = 128 if block_t >= 64 else 64
    tiles = ceil_div(outputs, block_m) * ceil_div(tokens, block_t)
    groups = ceil_div(features, GROUP)
    if splits is None:
        each = 4 if block_t <= 32 else 1  # programs that a multiprocessor holds at once
        splits = max(1, min(groups // 4, each * multiprocessors(x_TN) // tiles))
    per_split = ceil_div(groups, splits)
    splits = ceil_div(groups, per_split)
    target, direct = split_target(out, splits, bias_M)
    _gemm_fp8[(ceil_div(outputs, block_m), ceil_div(tokens, block_t), splits)](
        *(x_TN, weight_MN, x_scale, weight_scale, target, tokens, features, outputs, per_split),
        *(x_TN.stride(0), weight_MN.stride(0), x_scale.stride(0), weight_scale.stride(0), *target.stride()[:2]),
        GROUP=GROUP,
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        num_warps=8 if block_t >= 128 else 4,
        num_stages=stages(3),
        **early(x_TN),
    )
    return out if direct else sum_splits(target, bias_M, out)
