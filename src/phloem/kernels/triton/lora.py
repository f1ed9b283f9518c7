"""Low-rank additions of many adapters in one batch (Punica, Chen et al. 2023): each token may have another, or none.

`shrink` brings x to the adapter's rank, `expand` adds the result to y. A tile of tokens takes the adapters in it one
after another, each for as many tokens beside one another as have it: which those are is read on the device, so that a
recorded step serves any mixture. Legend: A adapters, P parts, r rank.
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
from phloem.kernels.triton._base import ceil_div, power_of_2

TILE = 16


@triton.jit(do_not_specialize=["tokens"])
def _shrink(
    x,
    down,
    out,
    index,
    tokens,
    features,
    rank,
    stride_x,
    stride_da,
    stride_dp,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0) * TILE
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    token = first + tl.arange(0, TILE)
    rows = token < tokens
    entry = tl.load(index + token, mask=rows, other=0)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    before = 0
    for place in range(0, TILE):
        here = tl.load(index + first + place, mask=first + place < tokens, other=0)
        if (here > 0) & (here != before):
            mine = rows & (entry == here)
            acc = tl.zeros([TILE, BLOCK_R], tl.float32)
            for start in range(0, features, BLOCK_K):
                some = start + k < features
                a = tl.load(
                    x + token.to(tl.int64)[:, None] * stride_x + (start + k)[None, :],
                    mask=mine[:, None] & some[None, :],
                    other=0.0,
                )
                b = tl.load(
                    down
                    + here.to(tl.int64) * stride_da
                    + part * stride_dp
                    + r[None, :] * features
                    + (start + k)[:, None],
                    mask=some[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
                acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
            at = out + (token.to(tl.int64)[:, None] * parts + part) * rank + r[None, :]
            tl.store(at, acc, mask=mine[:, None] & (r < rank)[None, :])
        before = here


@triton.jit(do_not_specialize=["tokens"])
def _expand(
    small,
    up,
    facts,
    factor,
    shift,
    y,
    index,
    tokens,
    begin,
    end,
    outputs,
    rank,
    part,
    parts,
    stride_ua,
    stride_y,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    first = tl.program_id(0) * TILE
    token = first + tl.arange(0, TILE)
    rows = token < tokens
    entry = tl.load(index + token, mask=rows, other=0)
    r = tl.arange(0, BLOCK_R)
    col = begin + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col < end
    a = tl.load(
        small + (token.to(tl.int64)[:, None] * parts + part) * rank + r[None, :],
        mask=(rows & (entry > 0))[:, None] & (r < rank)[None, :],
        other=0.0,
    )
    at = y + token.to(tl.int64)[:, None] * stride_y + col[None, :]
    total = tl.load(at, mask=rows[:, None] & cols[None, :], other=0.0).to(tl.float32)
    before = 0
    for place in range(0, TILE):
        here = tl.load(index + first + place, mask=first + place < tokens, other=0)
        if (here > 0) & (here != before):
            mine = rows & (entry == here)
            whose = here.to(tl.int64)
            b = tl.load(
                up + whose * stride_ua + r[:, None] * outputs + col[None, :],
                mask=cols[None, :] & (r < rank)[:, None],
                other=0.0,
            )
            value = total + tl.dot(a.to(b.dtype), b, input_precision="ieee")
            if tl.load(facts + 2 * whose + 1) > 0:
                by = tl.load(factor + whose * outputs + col, mask=cols, other=1.0)
                value = value * by[None, :] + tl.load(shift + whose * outputs + col, mask=cols, other=0.0)[None, :]
            tl.store(at, value.to(y.dtype.element_ty), mask=mine[:, None] & cols[None, :])
        before = here


def add_adapters(y_TM: Tensor, x_TN: Tensor, adapters: Adapters) -> Tensor:
    """factor * (y + (x downT) up) + shift by each token's adapter, in y's memory."""
    down_APrN, up_ArM, index = adapters.down, adapters.up, adapters.index
    tokens, features = x_TN.shape
    parts, rank = down_APrN.shape[1:3]
    outputs = up_ArM.shape[2]
    if tokens == 0:
        return y_TM
    small = torch.zeros((tokens, parts, rank), dtype=torch.float32, device=x_TN.device)
    tiles = ceil_div(tokens, TILE)
    block_r = max(16, power_of_2(rank))
    _shrink[(tiles, parts)](
        x_TN,
        down_APrN,
        small,
        index,
        tokens,
        features,
        rank,
        x_TN.stride(0),
        down_APrN.stride(0),
        down_APrN.stride(1),
        TILE=TILE,
        BLOCK_R=block_r,
        BLOCK_K=64,
    )
    block_m, begin = 64, 0
    for part, end in enumerate(adapters.ends.tolist()):
        _expand[(tiles, ceil_div(end - begin, block_m))](
            small,
            up_ArM,
            adapters.facts,
            adapters.factor,
            adapters.shift,
            y_TM,
            index,
            tokens,
            begin,
            end,
            outputs,
            rank,
            part,
            parts,
            up_ArM.stride(0),
            y_TM.stride(0),
            TILE=TILE,
            BLOCK_R=block_r,
            BLOCK_M=block_m,
        )
        begin = end
    return y_TM
