"""Multi-head latent attention (DeepSeek-V2, 2024) over a paged latent cache, by weight absorption.

The cache holds one latent vector per token, `[pages, 1, S, L + P]`: L compressed features, then P rotated ones. The
query is multiplied into latent space (W_UK absorbed), all heads share one "kv head", and what attention gives is
brought back to head space by W_UV: per token the cache is read once for all heads. Legend: L latent, P rotary part,
N (nope) and D (value) sizes of a head.
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton._base import find_row, power_of_2, soften, widened
from phloem.kernels.triton._device import multiprocessors
from phloem.kernels.triton.attention import decode_splits, join_splits, split_buffers

if TYPE_CHECKING:
    from phloem.kernels.calls import LatentCall, PagedBatch


@triton.jit(do_not_specialize=["rows", "stride_table"])
def _mla(
    q_latent,
    q_rope,
    cache,
    page_table,
    query_start,
    seq_lens,
    out,
    lse,
    rows,
    scale,
    stride_lt,
    stride_lh,
    stride_rt,
    stride_rh,
    stride_cp,
    stride_cs,
    stride_table,
    stride_ot,
    stride_oh,
    stride_os,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    DECODE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid (token tiles, blocks of heads, splits); a tile's rows are token * BLOCK_H + head."""
    tile = tl.program_id(0)
    split = tl.program_id(2)
    if DECODE:
        row = tile
        begin_token = tile
        tokens = 1
        first = 0
    else:
        row = find_row(query_start, tile, rows, BLOCK_T)
        begin_token = tl.load(query_start + row)
        tokens = tl.load(query_start + row + 1) - begin_token
        first = (tile - (begin_token // BLOCK_T + row)) * BLOCK_T
    if first >= tokens:
        return
    length = tl.load(seq_lens + row)
    m = tl.arange(0, BLOCK_T * BLOCK_H)
    token = first + m // BLOCK_H
    head = tl.program_id(1) * BLOCK_H + m % BLOCK_H
    valid = (token < tokens) & (head < HEADS)
    position = length - tokens + token
    packed = (begin_token + token).to(tl.int64)
    low = 0
    high = tl.minimum(length, length - tokens + first + BLOCK_T)
    if SPLITS > 1:
        size = tl.cdiv(tl.cdiv(high, SPLITS), BLOCK_N) * BLOCK_N
        low = split * size
        high = tl.minimum(high, low + size)
    at_lse = (packed * HEADS + head) * SPLITS + split
    if SPLITS > 1 and low >= high:
        tl.store(lse + at_lse, tl.full([BLOCK_T * BLOCK_H], float("-inf"), tl.float32), mask=valid)
        return

    latent = tl.arange(0, BLOCK_L)
    rope = tl.arange(0, BLOCK_P)
    at_q = packed[:, None] * stride_lt + head[:, None] * stride_lh + latent[None, :]
    query = tl.load(q_latent + at_q, mask=valid[:, None] & (latent < LATENT)[None, :], other=0.0)
    at_r = packed[:, None] * stride_rt + head[:, None] * stride_rh + rope[None, :]
    turned = tl.load(q_rope + at_r, mask=valid[:, None] & (rope < ROPE)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_T * BLOCK_H, BLOCK_L], tl.float32)
    top = tl.full([BLOCK_T * BLOCK_H], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_T * BLOCK_H], tl.float32)
    pages = page_table + row.to(tl.int64) * stride_table
    factor = scale * 1.4426950408889634
    for start in tl.range(low, high, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < high
        page = tl.load(pages + n // PAGE, mask=inside, other=0).to(tl.int64)
        at = cache + page * stride_cp + (n % PAGE) * stride_cs
        shared = tl.load(at[:, None] + latent[None, :], mask=inside[:, None] & (latent < LATENT)[None, :], other=0.0)
        key = tl.load(at[:, None] + LATENT + rope[None, :], mask=inside[:, None] & (rope < ROPE)[None, :], other=0.0)
        shared = widened(shared, query)
        scores = tl.dot(query, tl.trans(shared), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(widened(key, query)), scores, input_precision="ieee") * factor
        scores = tl.where(inside[None, :] & (n[None, :] <= position[:, None]), scores, float("-inf"))
        weights, shrink, top, mass = soften(scores, top, mass)
        acc = tl.dot(weights.to(query.dtype), shared, acc * shrink[:, None], input_precision="ieee")
    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    at_out = packed[:, None] * stride_ot + head[:, None] * stride_oh + split * stride_os + latent[None, :]
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=valid[:, None] & (latent < LATENT)[None, :])
    if SPLITS > 1:
        tl.store(lse + at_lse, tl.where(mass == 0.0, float("-inf"), top + tl.log2(mass)), mask=valid)


def absorbed_attention(
    q_latent_THL: Tensor, q_rope_THP: Tensor, cache: Tensor, batch: PagedBatch, scale: float, splits: int | None = None
) -> Tensor:
    """Attention in latent space: queries [T, H, L] and [T, H, P] over `[pages, 1, S, L + P]` -> [T, H, L]."""
    tokens, heads, latent = q_latent_THL.shape
    rope = q_rope_THP.shape[2]
    out = torch.empty((tokens, heads, latent), dtype=q_latent_THL.dtype, device=q_latent_THL.device)
    if tokens == 0:
        return out
    decode = batch.max_query_len == 1
    block_h = 16
    block_t = 1 if decode else 4
    rows = batch.seq_lens.shape[0]
    blocks = -(-heads // block_h)
    if not decode:
        splits = 1
    elif splits is None:
        splits = decode_splits(rows, blocks, multiprocessors(q_latent_THL))
    target, lse = split_buffers(out, splits)
    tiles = rows if decode else tokens // block_t + rows
    _mla[(tiles, blocks, splits)](
        q_latent_THL,
        q_rope_THP,
        cache,
        batch.page_table,
        batch.query_start,
        batch.seq_lens,
        target,
        lse,
        rows,
        scale,
        *q_latent_THL.stride()[:2],
        *q_rope_THP.stride()[:2],
        cache.stride(0),
        cache.stride(2),
        batch.page_table.stride(0),
        *target.stride()[:3],
        HEADS=heads,
        LATENT=latent,
        ROPE=rope,
        PAGE=cache.shape[2],
        DECODE=decode,
        SPLITS=splits,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        BLOCK_N=32 if decode and cache.element_size() <= 2 else 16,
        BLOCK_L=power_of_2(latent),
        BLOCK_P=max(16, power_of_2(rope)),
        num_warps=4 if decode else 8,
        num_stages=2,
    )
    if splits > 1:
        join_splits(target, lse, None, out)
    return out


def into_latent(q_nope_THN: Tensor, call: LatentCall) -> Tensor:
    """Queries [T, H, N] in latent space, [T, H, L], in memory a head's tokens together."""
    return torch.bmm(q_nope_THN.transpose(0, 1), call.w_uk.to(q_nope_THN.dtype)).transpose(0, 1)


def out_of_latent(out_THL: Tensor, call: LatentCall) -> Tensor:
    """What attention gives in latent space, as values of heads [T, H, D]."""
    heads, _, size = call.w_uv.shape
    # Heads side by side, as the output projection reads them: the product writes them there itself.
    out_THD = torch.empty((len(out_THL), heads, size), dtype=out_THL.dtype, device=out_THL.device)
    torch.bmm(out_THL.transpose(0, 1), call.w_uv.to(out_THL.dtype), out=out_THD.transpose(0, 1))
    return out_THD


def latent_attention(
    q_nope_THN: Tensor,
    q_rope_THP: Tensor,
    cache: Tensor,
    batch: PagedBatch,
    call: LatentCall,
    splits: int | None = None,
) -> Tensor:
    """Decode and extend of one MLA layer -> [T, H, D]; the new tokens' latents are already in the cache."""
    q_latent_THL = into_latent(q_nope_THN, call)
    return out_of_latent(absorbed_attention(q_latent_THL, q_rope_THP, cache, batch, call.scale, splits), call)
