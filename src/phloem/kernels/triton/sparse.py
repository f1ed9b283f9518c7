"""Latent attention to chosen keys (DeepSeek-V3.2, 2025): an indexer's cheap heads score the earlier tokens, the best of
them are chosen, and attention reads those alone.

Scores are float32 in a buffer of some tokens by the step's longest text; a token that sees no more than are chosen has
none. The choice is exact: a radix search, eight bits at a time, for the score of the last that is taken, then one pass
that writes the positions in their order; of equal scores the lowest positions win. Legend beside that of `_base.py`:
L latent, P rotary part, k positions of a token.
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

from phloem.kernels.triton._base import ceil_div, find_row, fp8_limit, power_of_2, soften
from phloem.kernels.triton._device import multiprocessors
from phloem.kernels.triton.attention import decode_splits, join_splits, split_buffers
from phloem.kernels.triton.early import await_previous, early
from phloem.kernels.triton.mla import into_latent, out_of_latent

if TYPE_CHECKING:
    from phloem.kernels.calls import IndexCall, LatentCall, PagedBatch

MOST_SCORES = 1 << 25  # numbers of the buffer: 128 MiB; longer steps choose for some tokens after others


@triton.jit
def _row_of(query_start, token, rows):
    """The row that a packed token belongs to."""
    low = 0
    high = rows
    while low < high:
        middle = (low + high) // 2
        begins = tl.load(query_start + middle)
        low = tl.where(begins <= token, middle + 1, low)
        high = tl.where(begins <= token, high, middle)
    return low - 1


@triton.jit(do_not_specialize=["first", "last", "rows", "splits", "stride_table", "stride_scores"])
def _index_scores(
    q,
    weights,
    cache,
    page_table,
    query_start,
    seq_lens,
    scores,
    first,
    last,
    rows,
    splits,
    stride_table,
    stride_scores,
    stride_qt,
    stride_qh,
    stride_wt,
    stride_cp,
    stride_cs,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of the tokens from `first` to `last`, parts of their rows' texts)."""
    await_previous(PDL)
    if DECODE:
        row = first + tl.program_id(0)
        begin = row
        tokens = 1
        within = 0
    else:
        tile = first // BLOCK_T + tl.program_id(0)
        row = find_row(query_start, tile, rows, BLOCK_T)
        begin = tl.load(query_start + row)
        tokens = tl.load(query_start + row + 1) - begin
        within = (tile - (begin // BLOCK_T + row)) * BLOCK_T
    if (within >= tokens) | (begin + within >= last) | (begin + within + BLOCK_T <= first):
        return
    length = tl.load(seq_lens + row)
    # Behind the last position that any of the tile's tokens sees.
    high = tl.minimum(length, length - tokens + within + BLOCK_T)
    if high <= COUNT:
        return
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    of_query = (h < HEADS)[:, None] & (d < SIZE)[None, :]
    pages = page_table + tl.cast(row, tl.int64) * stride_table
    for start in tl.range(tl.program_id(1) * BLOCK_N, high, splits * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < high
        page = tl.load(pages + n // PAGE, mask=inside, other=0).to(tl.int64)
        at = cache + page * stride_cp + (n % PAGE) * stride_cs
        key = tl.load(at[:, None] + d[None, :], mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)
        for j in range(BLOCK_T):
            token = tl.cast(begin + within + j, tl.int64)
            if (within + j < tokens) & (token >= first) & (token < last):
                at_q = q + token * stride_qt + h[:, None] * stride_qh + d[None, :]
                query = tl.load(at_q, mask=of_query, other=0.0)
                weight = tl.load(weights + token * stride_wt + h, mask=h < HEADS, other=0.0).to(tl.float32)
                dots = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
                score = tl.sum(tl.maximum(dots, 0.0) * weight[:, None], axis=0)
                tl.store(scores + (token - first) * stride_scores + n, score, mask=inside)


@triton.jit
def _ordered(x):
    """Floats as uint32 in the same order; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ tl.where(bits < 0, -1, -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _last_taken(scores, seen, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(The key of the COUNT-th best score, how many of that key are taken)."""
    bins = tl.arange(0, 256)
    found = tl.full([], 0, tl.uint32)
    wanted = tl.full([], COUNT, tl.int32)
    for byte in tl.static_range(4):
        counts = tl.zeros([256], tl.int32)
        for start in tl.range(0, seen, BLOCK):
            n = start + tl.arange(0, BLOCK)
            key = _ordered(tl.load(scores + n, mask=n < seen, other=0.0))
            here = n < seen
            if byte > 0:
                here = here & ((key >> (32 - 8 * byte)) == (found >> (32 - 8 * byte)))
            digit = ((key >> (24 - 8 * byte)) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=here)
        up_to = tl.cumsum(counts, axis=0, reverse=True)
        bin_of_last = (up_to >= wanted) & (up_to - counts < wanted)
        wanted -= tl.sum(tl.where(bin_of_last, up_to - counts, 0), axis=0)
        found = found | (tl.sum(tl.where(bin_of_last, bins, 0), axis=0).to(tl.uint32) << (24 - 8 * byte))
    return found, wanted


@triton.jit
def _write_best(scores, out, seen, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The positions of the COUNT best of `seen` scores, ascending."""
    bound, equals = _last_taken(scores, seen, COUNT, BLOCK)
    taken = tl.full([], 0, tl.int32)
    for start in tl.range(0, seen, BLOCK):
        n = start + tl.arange(0, BLOCK)
        key = _ordered(tl.load(scores + n, mask=n < seen, other=0.0))
        same = ((n < seen) & (key == bound)).to(tl.int32)
        more = ((n < seen) & (key > bound)).to(tl.int32)
        # Of those that are equal, the first so many.
        some = more + tl.where(tl.cumsum(same, axis=0) <= equals, same, 0)
        place = taken + tl.cumsum(some, axis=0) - some
        tl.store(out + place, n, mask=some > 0)
        taken += tl.sum(some, axis=0)
        equals -= tl.sum(same, axis=0)


@triton.jit(do_not_specialize=["first", "rows", "stride_scores"])
def _choose_best(
    scores,
    query_start,
    seq_lens,
    out,
    first,
    rows,
    stride_scores,
    COUNT: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens from `first` on)."""
    await_previous(PDL)
    token = first + tl.program_id(0)
    row = token
    if not DECODE:
        row = _row_of(query_start, token, rows)
    # Its own position and all before it.
    seen = tl.load(seq_lens + row)
    if not DECODE:
        seen += token + 1 - tl.load(query_start + row + 1)
    out += tl.cast(token, tl.int64) * COUNT
    if seen <= COUNT:
        for start in tl.range(0, COUNT, BLOCK):
            n = start + tl.arange(0, BLOCK)
            tl.store(out + n, tl.where(n < seen, n, -1), mask=n < COUNT)
    else:
        _write_best(scores + tl.program_id(0).to(tl.int64) * stride_scores, out, seen, COUNT, BLOCK)


def choose_keys(call: IndexCall, cache: Tensor, batch: PagedBatch, most: int = MOST_SCORES) -> Tensor:
    """As `reference_attention.choose_keys`, positions ascending; `most`: scores of the buffer."""
    tokens = call.q.shape[0]
    out = torch.empty((tokens, call.count), dtype=torch.int32, device=call.q.device)
    decode, rows = batch.max_query_len == 1, batch.seq_lens.shape[0]
    block_n = 64
    width = ceil_div(batch.max_seq_len, block_n) * block_n if batch.max_seq_len > call.count else 0
    step = max(1, min(tokens, most // width)) if width else tokens
    scores = torch.empty((step if width else 1, max(width, 1)), dtype=torch.float32, device=call.q.device)
    for first in range(0, tokens, max(1, step)):
        last = min(tokens, first + step)
        if width:
            _score(call, cache, batch, scores, first, last)
        _choose_best[(last - first,)](
            scores, batch.query_start, batch.seq_lens, out, first, rows, scores.stride(0),
            COUNT=call.count, DECODE=decode, BLOCK=min(4096, max(16, power_of_2(call.count))), num_warps=8,
            **early(out),
        )  # fmt: skip
    return out


def _score(call: IndexCall, cache: Tensor, batch: PagedBatch, scores: Tensor, first: int, last: int) -> None:
    _, heads, size = call.q.shape
    decode, rows = batch.max_query_len == 1, batch.seq_lens.shape[0]
    block_t = 1 if decode else 8
    tiles = last - first if decode else ceil_div(last - first, block_t) + rows + 1
    # Enough programs to fill the device a few times; how long the texts are does not matter to the launch.
    splits = max(1, min(ceil_div(scores.shape[1], 64), 4 * multiprocessors(call.q) // tiles))
    _index_scores[(tiles, splits)](
        call.q,
        call.weights,
        cache,
        batch.page_table,
        batch.query_start,
        batch.seq_lens,
        scores,
        first,
        last,
        rows,
        splits,
        batch.page_table.stride(0),
        scores.stride(0),
        *call.q.stride()[:2],
        call.weights.stride(0),
        cache.stride(0),
        cache.stride(2),
        COUNT=call.count,
        HEADS=heads,
        SIZE=size,
        PAGE=cache.shape[2],
        DECODE=decode,
        BLOCK_T=block_t,
        BLOCK_H=max(16, power_of_2(heads)),
        BLOCK_N=64 if call.q.element_size() <= 2 else 32,
        BLOCK_D=max(16, power_of_2(size)),
        num_warps=4,
        num_stages=2,
        **early(scores),
    )


@triton.jit(do_not_specialize=["rows", "stride_table"])
def _chosen_mla(
    q_latent,
    q_rope,
    cache,
    page_table,
    query_start,
    seq_lens,
    chosen,
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
    stride_kt,
    stride_ot,
    stride_oh,
    stride_os,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    DECODE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens, blocks of heads, splits)."""
    await_previous(PDL)
    token = tl.program_id(0)
    split = tl.program_id(2)
    row = token
    if not DECODE:
        row = _row_of(query_start, token, rows)
    seen = tl.load(seq_lens + row)
    if not DECODE:
        seen += token + 1 - tl.load(query_start + row + 1)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    valid = head < HEADS
    packed = tl.cast(token, tl.int64)
    low = 0
    high = tl.minimum(seen, COUNT)
    if SPLITS > 1:
        size = tl.cdiv(tl.cdiv(high, SPLITS), BLOCK_N) * BLOCK_N
        low = split * size
        high = tl.minimum(high, low + size)
    at_lse = (packed * HEADS + head) * SPLITS + split
    if SPLITS > 1 and low >= high:
        tl.store(lse + at_lse, tl.full([BLOCK_H], float("-inf"), tl.float32), mask=valid)
        return

    latent = tl.arange(0, BLOCK_L)
    rope = tl.arange(0, BLOCK_P)
    at_q = packed * stride_lt + head[:, None] * stride_lh + latent[None, :]
    query = tl.load(q_latent + at_q, mask=valid[:, None] & (latent < LATENT)[None, :], other=0.0)
    at_r = packed * stride_rt + head[:, None] * stride_rh + rope[None, :]
    turned = tl.load(q_rope + at_r, mask=valid[:, None] & (rope < ROPE)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_H], tl.float32)
    pages = page_table + tl.cast(row, tl.int64) * stride_table
    chosen += packed * stride_kt
    factor = scale * 1.4426950408889634
    for start in tl.range(low, high, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        position = tl.load(chosen + n, mask=n < high, other=-1)
        inside = (position >= 0) & (position < seen)
        page = tl.load(pages + position // PAGE, mask=inside, other=0).to(tl.int64)
        at = cache + page * stride_cp + (position % PAGE) * stride_cs
        shared = tl.load(at[:, None] + latent[None, :], mask=inside[:, None] & (latent < LATENT)[None, :], other=0.0)
        key = tl.load(at[:, None] + LATENT + rope[None, :], mask=inside[:, None] & (rope < ROPE)[None, :], other=0.0)
        shared = shared.to(query.dtype)
        scores = tl.dot(query, tl.trans(shared), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(key.to(query.dtype)), scores, input_precision="ieee") * factor
        scores = tl.where(inside[None, :], scores, float("-inf"))
        weights, shrink, top, mass = soften(scores, top, mass)
        acc = tl.dot(weights.to(query.dtype), shared, acc * shrink[:, None], input_precision="ieee")
    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    at_out = packed * stride_ot + head[:, None] * stride_oh + split * stride_os + latent[None, :]
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=valid[:, None] & (latent < LATENT)[None, :])
    if SPLITS > 1:
        tl.store(lse + at_lse, tl.where(mass == 0.0, float("-inf"), top + tl.log2(mass)), mask=valid)


def chosen_latent_attention(
    q_nope_THN: Tensor,
    q_rope_THP: Tensor,
    cache: Tensor,
    batch: PagedBatch,
    call: LatentCall,
    chosen_Tk: Tensor,
    splits: int | None = None,
) -> Tensor:
    """As `reference_attention.latent_attention` with positions, which for each token are as many as it sees, or k."""
    q_latent_THL = into_latent(q_nope_THN, call)
    tokens, heads, latent = q_latent_THL.shape
    rope, rows = q_rope_THP.shape[2], batch.seq_lens.shape[0]
    out = torch.empty((tokens, heads, latent), dtype=q_latent_THL.dtype, device=q_latent_THL.device)
    if tokens:
        decode, half = batch.max_query_len == 1, q_latent_THL.element_size() <= 2
        # A token's latents are read once for each block of heads: a larger one where there are tokens enough.
        block_h = 32 if half and heads > 16 and not decode and not torch.version.hip else 16
        blocks = ceil_div(heads, block_h)
        if not decode:
            splits = 1
        elif splits is None:
            splits = decode_splits(rows, blocks, multiprocessors(q_latent_THL))
        target, lse = split_buffers(out, splits)
        _chosen_mla[(tokens, blocks, splits)](
            q_latent_THL,
            q_rope_THP,
            cache,
            batch.page_table,
            batch.query_start,
            batch.seq_lens,
            chosen_Tk,
            target,
            lse,
            rows,
            call.scale,
            *q_latent_THL.stride()[:2],
            *q_rope_THP.stride()[:2],
            *(cache.stride(0), cache.stride(2), batch.page_table.stride(0), chosen_Tk.stride(0)),
            *target.stride()[:3],
            COUNT=chosen_Tk.shape[1],
            HEADS=heads,
            LATENT=latent,
            ROPE=rope,
            PAGE=cache.shape[2],
            DECODE=decode,
            SPLITS=splits,
            BLOCK_H=block_h,
            BLOCK_N=32 if half else 16,
            BLOCK_L=power_of_2(latent),
            BLOCK_P=max(16, power_of_2(rope)),
            num_warps=8 if block_h == 32 else 4,
            num_stages=2,
            **early(out),
        )
        if splits > 1:
            join_splits(target, lse, None, out)
    return out_of_latent(out, call)


@triton.jit
def _write_latent(
    latents, cache, slots, stride_lt, stride_cp, stride_cs, width, PAGE: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks of features)."""
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + token).to(tl.int64)
    value = tl.load(latents + token * stride_lt + n, mask=n < width, other=0.0)
    if LIMIT > 0:
        value = tl.minimum(tl.maximum(value.to(tl.float32), -LIMIT), LIMIT)
    at = cache + (slot // PAGE) * stride_cp + (slot % PAGE) * stride_cs + n
    tl.store(at, value.to(cache.dtype.element_ty), mask=n < width)


def write_latent(latent_TC: Tensor, cache: Tensor, slots_T: Tensor) -> None:
    """As `reference_attention.write_latent`."""
    tokens, width = latent_TC.shape
    if tokens:
        block = min(1024, power_of_2(width))
        _write_latent[(tokens, ceil_div(width, block))](
            latent_TC, cache, slots_T, latent_TC.stride(0), cache.stride(0), cache.stride(2), width,
            PAGE=cache.shape[2], LIMIT=fp8_limit(cache.dtype), BLOCK=block, **early(cache),
        )  # fmt: skip
