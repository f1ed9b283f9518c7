"""Paged attention: one kernel body behind decode (split KV) and extend (ragged new tokens over a paged prefix).

The query heads that share a kv head are packed into the rows of one tile (row = token * GROUP + head), so each KV
element is loaded once per group. Softmax runs online in base 2 (FlashAttention-2, Dao 2023); with several splits of
the KV range, each leaves its own normalised part and a second kernel joins them (Flash-Decoding, Dao et al. 2023).
A decode tile is one token; extend tiles are found by `find_row`, so neither needs a schedule from the host.

Where rows share leading pages (`batch.shared`), `shared.py` attends to those once for all rows, this kernel to what
lies behind them, and `_join_splits` merges both. A decode step keeps parts for every row, so that a recorded step holds
any sharing; other steps keep parts for the sharing tokens alone, and the other rows' results go straight to the output.
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

from phloem.kernels.triton import shared
from phloem.kernels.triton._base import ceil_div, find_row, half_beside, power_of_2, stages
from phloem.kernels.triton._block import attend_block
from phloem.kernels.triton._device import multiprocessors
from phloem.kernels.triton.early import await_previous, early

if TYPE_CHECKING:
    from phloem.kernels.calls import AttentionCall, Cache, PagedBatch, SharedPages

MAX_SPLITS = 32


@triton.jit(do_not_specialize=["rows", "split_size", "parts", "stride_table", "stride_tree"])
def _attention(
    q,
    k_cache,
    v_cache,
    page_table,
    query_start,
    seq_lens,
    k_scale,
    v_scale,
    sinks,
    tree,
    out,
    lse,
    shared_lens,
    places,
    whole,
    rows,
    scale,
    softcap,
    window,
    split_size,
    parts,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kk,
    stride_ks,
    stride_vp,
    stride_vk,
    stride_vs,
    stride_table,
    stride_tree,
    stride_ot,
    stride_oh,
    stride_os,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    PAGE: tl.constexpr,
    DECODE: tl.constexpr,
    SPLITS: tl.constexpr,
    FIXED: tl.constexpr,
    PARTIAL: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    TREE: tl.constexpr,
    SCALED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr,
):
    """`parts`: results that are joined, of which the first SPLITS are this kernel's; with FIXED, whose number follows
    from the texts' lengths, SPLITS says only whether they are several. With SHARED and without DECODE only rows that
    share leave parts, at their tokens' `places`; those of the others are written to `whole`."""
    await_previous(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP_P2
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
    prefix = length - tokens
    m = tl.arange(0, BLOCK_M)
    token = first + m // GROUP_P2
    within = m % GROUP_P2
    head = kv_head * GROUP + within
    valid = (token < tokens) & (within < GROUP)
    position = prefix + token
    packed = (begin_token + token).to(tl.int64)

    # The KV range of this tile, and of this split of it.
    low = 0
    if WINDOW:
        low = tl.maximum(prefix + first - window + 1, 0)
    apart = 0
    if SHARED:
        apart = tl.load(shared_lens + row)  # tokens at its start that are attended to for all rows that share them
        low = tl.maximum(low, apart)
    high = length if TREE else tl.minimum(length, prefix + first + BLOCK_T)
    if SPLITS > 1:
        size = split_size if FIXED else tl.cdiv(tl.cdiv(high - low, SPLITS), BLOCK_N) * BLOCK_N
        low = low + split * size
        high = tl.minimum(high, low + size)
    part = packed
    if SHARED and not DECODE:
        part = tl.load(places + packed, mask=valid, other=0).to(tl.int64)
    at_lse = (part * HEADS + head) * parts + split
    if PARTIAL and low >= high:
        tl.store(lse + at_lse, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=valid)
        return

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    query = tl.load(
        q + packed[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :],
        mask=valid[:, None] & (d < HEAD)[None, :],
        other=0.0,
    )
    query = half_beside(query, k_cache)
    factor = scale
    if SCALED == 1:
        factor = factor * tl.load(k_scale)
    if SCALED == 2:
        factor = factor * tl.load(k_scale + kv_head)
    if not CAPPED:
        factor = factor * 1.4426950408889634
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    if SINKS and not PARTIAL:
        # A sink is one more logit whose value is zero. With several splits it is joined in the second kernel.
        top = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
        mass += 1.0
        if SHARED:  # nor is it seen by the own part of a row that shares
            top = tl.where(apart > 0, float("-inf"), top)
            mass = tl.where(apart > 0, 0.0, mass)
    pages = page_table + row.to(tl.int64) * stride_table
    k_base = k_cache + kv_head.to(tl.int64) * stride_kk
    v_base = v_cache + kv_head.to(tl.int64) * stride_vk
    tree_row = tree + packed * stride_tree

    # Blocks that every token of the tile sees whole need no mask; those at either edge do.
    if WINDOW:
        plain_begin = low + tl.cdiv(tl.maximum(prefix + first + BLOCK_T - window - low, 0), BLOCK_N) * BLOCK_N
        plain_begin = tl.minimum(plain_begin, low + tl.cdiv(high - low, BLOCK_N) * BLOCK_N)
    else:
        plain_begin = low
    seen_by_all = tl.minimum(prefix if TREE else prefix + first + 1, high)
    plain_end = plain_begin + tl.maximum(seen_by_all - plain_begin, 0) // BLOCK_N * BLOCK_N
    if WINDOW:
        for start in tl.range(low, plain_begin, BLOCK_N):
            acc, top, mass = attend_block(
                query, acc, top, mass, k_base, v_base, pages, tree_row, start, high, position, prefix,
                stride_kp, stride_ks, stride_vp, stride_vs, factor, softcap, window,
                HEAD, HEAD_V, PAGE, True, CAPPED, WINDOW, TREE, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    for start in tl.range(plain_begin, plain_end, BLOCK_N):
        acc, top, mass = attend_block(
            query, acc, top, mass, k_base, v_base, pages, tree_row, start, high, position, prefix,
            stride_kp, stride_ks, stride_vp, stride_vs, factor, softcap, window,
            HEAD, HEAD_V, PAGE, False, CAPPED, WINDOW, TREE, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for start in tl.range(plain_end, high, BLOCK_N):
        acc, top, mass = attend_block(
            query, acc, top, mass, k_base, v_base, pages, tree_row, start, high, position, prefix,
            stride_kp, stride_ks, stride_vp, stride_vs, factor, softcap, window,
            HEAD, HEAD_V, PAGE, True, CAPPED, WINDOW, TREE, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    if SCALED == 1:
        acc = acc * tl.load(v_scale)
    if SCALED == 2:
        acc = acc * tl.load(v_scale + kv_head)
    at_out = part[:, None] * stride_ot + head[:, None] * stride_oh + split * stride_os + dv[None, :]
    keep = valid[:, None] & (dv < HEAD_V)[None, :]
    if SHARED and not DECODE:
        alone = valid & (tl.where(valid, apart, 1) == 0)
        sharing = tl.where(valid, apart, 0) > 0
        at_whole = (packed * HEADS + head)[:, None] * HEAD_V + dv[None, :]
        tl.store(whole + at_whole, acc.to(whole.dtype.element_ty), mask=keep & alone[:, None])
        keep = keep & sharing[:, None]
        tl.store(lse + at_lse, tl.where(mass == 0.0, float("-inf"), top + tl.log2(mass)), mask=sharing)
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=keep)
    if PARTIAL:
        tl.store(lse + at_lse, tl.where(mass == 0.0, float("-inf"), top + tl.log2(mass)), mask=valid)


@triton.jit(do_not_specialize=["splits", "own"])
def _join_splits(
    partial,
    lse,
    sinks,
    out,
    shared_lens,
    members,
    stride_ot,
    stride_oh,
    splits,
    own,
    HEADS: tl.constexpr,
    HEAD_V: tl.constexpr,
    SINKS: tl.constexpr,
    SHARED: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = sum over splits of 2^(lse - top) * partial, normalised. BLOCK_S splits are read at once: read one after
    another each would wait for the memory. It follows from the head's size alone, so the order of the sum is fixed.

    SHARED: a row that shares nothing has but its `own` parts. MEMBERS: parts are kept for the tokens listed there."""
    await_previous(PDL)
    place = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = (place * HEADS + head) * splits
    token = place
    if MEMBERS:
        token = tl.load(members + place).to(tl.int64)
    parts = splits
    if SHARED:
        parts = tl.where(tl.load(shared_lens + place) > 0, splits, own)
    dv = tl.arange(0, BLOCK_DV)
    some = tl.arange(0, BLOCK_S)
    top = float("-inf")
    mass = 0.0
    if SINKS:
        top = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        mass = 1.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, parts, BLOCK_S):
        split = start + some
        part_lse = tl.load(lse + at + split, mask=split < parts, other=float("-inf"))
        # A part without keys was not written.
        there = (part_lse > float("-inf"))[:, None] & (dv < HEAD_V)[None, :]
        part = tl.load(partial + (at + split)[:, None] * HEAD_V + dv[None, :], mask=there, other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, axis=0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - finite)
        weight = tl.exp2(part_lse - finite)
        acc = acc * shrink + tl.sum(part * weight[:, None], axis=0)
        mass = mass * shrink + tl.sum(weight, axis=0)
        top = new_top
    acc = acc / tl.where(mass == 0.0, 1.0, mass)
    tl.store(out + token * stride_ot + head * stride_oh + dv, acc.to(out.dtype.element_ty), mask=dv < HEAD_V)


def join_splits(
    partial: Tensor,
    lse: Tensor,
    sinks_H: Tensor | None,
    out_THD: Tensor,
    *,
    shared_lens: Tensor | None = None,
    own: int = 0,
    members: Tensor | None = None,
) -> None:
    """partial [T, H, splits, D] float32 with lse [T, H, splits] in base 2 -> out [T, H, D].

    With `shared_lens` [T] a token whose number is 0 has but its first `own` parts. With `members` [M] parts are kept
    for these tokens alone, [M, H, splits, D], and only they are written.
    """
    places, heads, splits, size = partial.shape
    if places == 0:
        return
    _join_splits[(places, heads)](
        partial,
        lse,
        sinks_H if sinks_H is not None else lse,
        out_THD,
        shared_lens if shared_lens is not None else lse,
        members if members is not None else lse,
        out_THD.stride(0),
        out_THD.stride(1),
        splits,
        own,
        HEADS=heads,
        HEAD_V=size,
        SINKS=sinks_H is not None,
        SHARED=shared_lens is not None,
        MEMBERS=members is not None,
        BLOCK_S=max(8, min(32, 4096 // power_of_2(size))),
        BLOCK_DV=power_of_2(size),
        **early(out_THD),
    )


def split_buffers(out_THD: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where a kernel of `splits` parts writes: (parts [T, H, splits, D], lse [T, H, splits]); one part is `out`."""
    if splits == 1:
        return out_THD.unsqueeze(2), out_THD
    return shared.part_buffers(out_THD, out_THD.shape[0], splits)


def decode_splits(rows: int, kv_heads: int, processors: int) -> int:
    """How many parts a decode step's KV range is cut into: enough programs to fill the device twice.

    It follows from the number of rows alone, never from their lengths, so a captured step serves every length.
    """
    return max(1, min(MAX_SPLITS, 2 * processors // max(rows * kv_heads, 1)))


def _tile(decode: bool, group: int, block_d: int, wide: bool, tree: bool) -> tuple[int, int, int, int]:
    """(rows of a tile, KV tokens of a block, warps, stages). The bounds are registers: see scripts/triton_compile.py.

    Page ids are loaded before the KV they point to, which takes pipeline stages of its own: five give two KV blocks.
    """
    group_p2 = power_of_2(group)
    if decode:
        return max(16, group_p2), 64 if block_d <= 128 and not wide else 32, 4, stages(2 if wide else 5)
    if wide:
        return max(16, group_p2), 32, 4, 2
    block_m = max(64 if tree or block_d > 128 else 128, group_p2)
    return block_m, 32 if tree or block_d > 128 else 64, 4 if tree else 8, 2


def _launch(
    q_THD: Tensor,
    cache: Cache,
    batch: PagedBatch,
    call: AttentionCall,
    outs: tuple[Tensor, Tensor, Tensor],
    pages: SharedPages | None,
    tile: tuple[int, int, int, int],
    parting: tuple[int, int, int, bool],
    decode: bool,
    scales: tuple[Tensor, Tensor] | None,
    tree_mask: Tensor | None,
) -> None:
    """`outs`: result, parts, their log-sum-exps. `tile`: rows, keys, warps, stages. `parting`: splits, split size, a
    token's parts in all, whether parts are written."""
    (out, target, lse), (block_m, block_n, warps, depth) = outs, tile
    splits, split_size, parts, partial = parting
    (tokens, heads, size), (k_cache, v_cache) = q_THD.shape, cache
    kv_heads, page_size, size_v = v_cache.shape[1:]
    rows, group = batch.seq_lens.shape[0], heads // kv_heads
    window, cap, sinks_H = call.window, call.softcap, call.sinks
    block_d, block_dv = power_of_2(size), power_of_2(size_v)
    tiles = rows if decode else tokens // (block_m // power_of_2(group)) + rows
    k_scale, v_scale = scales if scales is not None else (q_THD, q_THD)
    features = {"CAPPED": cap != 0.0, "WINDOW": window > 0, "SINKS": sinks_H is not None, "TREE": tree_mask is not None}
    tree = tree_mask if tree_mask is not None else q_THD
    lens, places = (q_THD, q_THD) if pages is None else (pages.lens, pages.members if decode else pages.places)
    _attention[(tiles, kv_heads, splits)](
        *(q_THD, k_cache, v_cache, batch.page_table, batch.query_start, batch.seq_lens, k_scale, v_scale),
        *(sinks_H if sinks_H is not None else q_THD, tree, target, lse, lens, places, out, rows),
        *(call.scale, cap if cap else 1.0, window, split_size, parts),
        *(*q_THD.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        *(batch.page_table.stride(0), tree.stride(0), *target.stride()[:3]),
        HEADS=heads,
        GROUP=group,
        GROUP_P2=power_of_2(group),
        HEAD=size,
        HEAD_V=size_v,
        PAGE=page_size,
        DECODE=decode,
        SPLITS=min(splits, 2) if split_size else splits,
        FIXED=split_size > 0,
        PARTIAL=partial,
        **features,
        SCALED=0 if scales is None else (1 if scales[0].numel() == 1 else 2),
        SHARED=pages is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=warps,
        num_stages=depth,
        **early(q_THD),
    )


def _run(
    q_THD: Tensor,
    cache: Cache,
    batch: PagedBatch,
    call: AttentionCall,
    *,
    decode: bool,
    splits: int = 1,
    split_size: int = 0,
    scales: tuple[Tensor, Tensor] | None = None,
    tree_mask: Tensor | None = None,
) -> Tensor:
    if not call.plain:
        raise ValueError("attention in Triton is causal, without chunks and blocks")
    tokens, heads, size = q_THD.shape
    kv_heads, _, size_v = cache[1].shape[1:]
    out = torch.empty((tokens, heads, size_v), dtype=q_THD.dtype, device=q_THD.device)
    if tokens == 0:
        return out
    wide, block_d = q_THD.dtype == torch.float32, power_of_2(max(size, size_v))
    tile = _tile(decode, heads // kv_heads, block_d, wide, tree_mask is not None)
    pages = None if tree_mask is not None or split_size else batch.shared
    if pages is not None and decode:
        # Short as they are behind shared pages, rows' own parts come in few numbers: each is a kernel of its own.
        splits = shared.own_splits(splits)
    # Parts of each token: its own, then those of what its row shares.
    parts = splits + (shared.splits_of(decode) if pages is not None else 0)
    partial = parts > 1 and (decode or pages is None)
    if pages is None or decode:
        target, lse = split_buffers(out, parts)
    else:
        target, lse = shared.part_buffers(out, pages.members.shape[0], parts)
    parting = splits, split_size, parts, partial
    _launch(q_THD, cache, batch, call, (out, target, lse), pages, tile, parting, decode, scales, tree_mask)
    if pages is not None:
        shared.attend(q_THD, cache, batch, call, pages, (target, lse), splits, decode=decode, scales=scales)
        some = {"shared_lens": pages.lens, "own": splits} if decode else {"members": pages.members}
        join_splits(target, lse, call.sinks, out, **some)
    elif partial:
        join_splits(target, lse, call.sinks, out)
    return out


def decode_attention(
    q_THD: Tensor,
    cache: Cache,
    batch: PagedBatch,
    call: AttentionCall,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    splits: int | None = None,
    split_size: int = 0,
) -> Tensor:
    """One new token per row. `split_size` cuts every row's KV into parts of that many tokens (a batch-invariant order;
    `batch.max_seq_len` then bounds the parts); otherwise `splits`, or a number that fills the device.
    """
    if split_size:
        splits = ceil_div(min(batch.max_seq_len, call.window or batch.max_seq_len), split_size)
    elif splits is None:
        splits = decode_splits(q_THD.shape[0], cache[0].shape[1], multiprocessors(q_THD))
    return _run(
        q_THD,
        cache,
        batch,
        call,
        decode=True,
        splits=max(splits, 1),
        split_size=split_size,
        scales=scales,
    )


def extend_attention(
    q_THD: Tensor,
    cache: Cache,
    batch: PagedBatch,
    call: AttentionCall,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    tree_mask: Tensor | None = None,
) -> Tensor:
    """Ragged new tokens, whose KV is already in the cache, over their rows' pages.

    `tree_mask` [T, max_query_len] (bool or uint8) says which of its row's new tokens a new token sees, in place of
    the causal rule among them (draft trees); all of the prefix stays visible. With a window, distance is counted
    in cache slots.
    """
    return _run(
        q_THD,
        cache,
        batch,
        call,
        decode=False,
        scales=scales,
        tree_mask=tree_mask.view(torch.uint8) if tree_mask is not None else None,
    )


def paged_attention(q_THD: Tensor, cache: Cache, batch: PagedBatch, call: AttentionCall) -> Tensor:
    """The op table's entry: decode where every row has one new token, else extend."""
    run = decode_attention if batch.max_query_len == 1 else extend_attention
    return run(q_THD, cache, batch, call)
