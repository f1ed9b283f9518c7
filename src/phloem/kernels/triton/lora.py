"""Segmented LoRA (Punica, Chen et al. 2023): each row of a ragged batch may use another adapter, or none.

`shrink` brings x to the adapter's rank, `expand` adds the result to y. A segment's tokens are consecutive; adapters of
smaller rank than the stack's are padded with zeros. Legend: A adapters, r rank.
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

from phloem.kernels.calls import Adapters
from phloem.kernels.triton._base import ceil_div, find_row, power_of_2

TILE = 16


@triton.jit(do_not_specialize=["segments"])
def _shrink(
    x,
    down,
    out,
    start_of,
    adapter_of,
    segments,
    features,
    rank,
    stride_x,
    stride_da,
    stride_dr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    segment = find_row(start_of, tile, segments, TILE)
    begin = tl.load(start_of + segment)
    end = tl.load(start_of + segment + 1)
    token = begin + (tile - (begin // TILE + segment)) * TILE + tl.arange(0, TILE)
    adapter = tl.load(adapter_of + segment).to(tl.int64)
    rows = token < end
    if adapter < 0:
        rows = rows & False
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([TILE, BLOCK_R], tl.float32)
    if adapter >= 0:
        for start in range(0, features, BLOCK_K):
            some = start + k < features
            a = tl.load(
                x + token.to(tl.int64)[:, None] * stride_x + (start + k)[None, :],
                mask=rows[:, None] & some[None, :],
                other=0.0,
            )
            b = tl.load(
                down + adapter * stride_da + r[None, :] * stride_dr + (start + k)[:, None],
                mask=some[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    tl.store(out + token.to(tl.int64)[:, None] * rank + r[None, :], acc, mask=rows[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["segments"])
def _expand(
    small,
    up,
    y,
    start_of,
    adapter_of,
    scaling,
    segments,
    outputs,
    rank,
    stride_ua,
    stride_um,
    stride_y,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tile = tl.program_id(0)
    segment = find_row(start_of, tile, segments, TILE)
    begin = tl.load(start_of + segment)
    end = tl.load(start_of + segment + 1)
    token = begin + (tile - (begin // TILE + segment)) * TILE + tl.arange(0, TILE)
    adapter = tl.load(adapter_of + segment).to(tl.int64)
    if adapter < 0:
        return
    rows = token < end
    r = tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col < outputs
    a = tl.load(
        small + token.to(tl.int64)[:, None] * rank + r[None, :], mask=rows[:, None] & (r < rank)[None, :], other=0.0
    )
    b = tl.load(
        up + adapter * stride_ua + col[None, :] * stride_um + r[:, None],
        mask=cols[None, :] & (r < rank)[:, None],
        other=0.0,
    )
    extra = tl.dot(a.to(b.dtype), b, input_precision="ieee") * tl.load(scaling + adapter)
    at = y + token.to(tl.int64)[:, None] * stride_y + col[None, :]
    keep = rows[:, None] & cols[None, :]
    tl.store(at, (tl.load(at, mask=keep, other=0.0).to(tl.float32) + extra).to(y.dtype.element_ty), mask=keep)


def add_adapters(y_TM: Tensor, x_TN: Tensor, adapters: Adapters) -> Tensor:
    """y + scale * (x downT) upT for each segment's adapter, in y's memory."""
    down_ArN, up_AMr, start_of, adapter_of = adapters.down, adapters.up, adapters.start, adapters.index
    tokens, features = x_TN.shape
    outputs, rank = up_AMr.shape[1:]
    segments = adapter_of.shape[0]
    if tokens == 0:
        return y_TM
    small = torch.empty((tokens, rank), dtype=torch.float32, device=x_TN.device)
    tiles = tokens // TILE + segments
    block_r = max(16, power_of_2(rank))
    _shrink[(tiles,)](
        x_TN,
        down_ArN,
        small,
        start_of,
        adapter_of,
        segments,
        features,
        rank,
        x_TN.stride(0),
        down_ArN.stride(0),
        down_ArN.stride(1),
        TILE=TILE,
        BLOCK_R=block_r,
        BLOCK_K=64,
    )
    block_m = 64
    _expand[(tiles, ceil_div(outputs, block_m))](
        small,
        up_AMr,
        y_TM,
        start_of,
        adapter_of,
        adapters.scale,
        segments,
        outputs,
        rank,
        up_AMr.stride(0),
        up_AMr.stride(1),
        y_TM.stride(0),
        TILE=TILE,
        BLOCK_R=block_r,
        BLOCK_M=block_m,
    )
    return y_TM
