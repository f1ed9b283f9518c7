"""The leading pages that several rows share, attended to once for all of them (Hydragen, Juravsky et al. 2024).

The new tokens of all rows of a group are packed into tiles, so a shared page is read once a tile instead of once a row.
What comes out are parts of the softmax with their log-sum-exp, which `attention.py` merges with the parts of the rows'
own pages. Which rows share what is data on the device: a recorded step serves every sharing, and none.

Sharing tokens lie behind everything that their group shares, so no causal mask is needed; a window masks by position.
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

from phloem.kernels.specs import SHARED_SPLITS, shared_tile
from phloem.kernels.triton._base import find_row, half_beside, power_of_2, stages
from phloem.kernels.triton._block import attend_block
from phloem.kernels.triton.early import await_previous, early

if TYPE_CHECKING:
    from phloem.kernels.calls import AttentionCall, Cache, PagedBatch, SharedPages


def splits_of(decode: bool) -> int:
    """Parts that are kept for the shared pages of each token."""
    return SHARED_SPLITS[0 if decode else 1]


def own_splits(wanted: int) -> int:
    """Parts of what a row has for itself, in a decode step: 1, 2 or 4."""
    return 4 if wanted >= 4 else 2 if wanted >= 2 else 1


def part_buffers(out_THD: Tensor, tokens: int, parts: int) -> tuple[Tensor, Tensor]:
    """(parts [tokens, H, parts, D], lse [tokens, H, parts]), float32."""
    _, heads, size = out_THD.shape
    part = torch.empty((tokens, heads, parts, size), dtype=torch.float32, device=out_THD.device)
    return part, torch.empty((tokens, heads, parts), dtype=torch.float32, device=out_THD.device)


@triton.jit(do_not_specialize=["count", "stride_table"])
def _attend_shared(
    q,
    k_cache,
    v_cache,
    page_table,
    group_start,
    groups,
    members,
    positions,
    k_scale,
    v_scale,
    out,
    lse,
    count,
    scale,
    softcap,
    window,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kk,
    stride_ks,
    stride_vp,
    stride_vk,
    stride_vs,
    stride_table,
    stride_ot,
    stride_oh,
    stride_os,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    PAGE: tl.constexpr,
    OWN: tl.constexpr,
    PARTS: tl.constexpr,
    COMPACT: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of sharing tokens, kv heads, splits). COMPACT: parts lie by place among `members`, not by token."""
    await_previous(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP_P2
    group = find_row(group_start, tile, count, BLOCK_T)
    begin = tl.load(group_start + group)
    tokens = tl.load(group_start + group + 1) - begin
    first = (tile - (begin // BLOCK_T + group)) * BLOCK_T
    if first >= tokens:
        return
    row = tl.load(groups + group * 3).to(tl.int64)
    size = tl.load(groups + group * 3 + 2)
    low = split * size
    high = tl.minimum(tl.load(groups + group * 3 + 1), low + size)
    m = tl.arange(0, BLOCK_M)
    within = m % GROUP_P2
    valid = (first + m // GROUP_P2 < tokens) & (within < GROUP)
    head = kv_head * GROUP + within
    place = begin + first + m // GROUP_P2
    token = tl.load(members + place, mask=valid, other=0).to(tl.int64)
    position = tl.load(positions + place, mask=valid, other=2147483647)
    if WINDOW:
        # What lies before the window of every token of the tile is not read.
        unseen = tl.maximum(tl.min(position, axis=0) - window + 1 - low, 0) // BLOCK_N * BLOCK_N
        low = tl.minimum(low + unseen, tl.maximum(low, high))
    index = place.to(tl.int64) if COMPACT else token
    at_lse = (index * HEADS + head) * PARTS + OWN + split
    if low >= high:
        tl.store(lse + at_lse, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=valid)
        return

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    query = tl.load(
        q + token[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :],
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
    pages = page_table + row * stride_table
    k_base = k_cache + kv_head.to(tl.int64) * stride_kk
    v_base = v_cache + kv_head.to(tl.int64) * stride_vk
    # Without a window only the last block, where it is not whole, needs a mask.
    masked = low if WINDOW else low + (high - low) // BLOCK_N * BLOCK_N
    for start in tl.range(low, masked, BLOCK_N):
        acc, top, mass = attend_block(
            query, acc, top, mass, k_base, v_base, pages, page_table, start, high, position, 0,
            stride_kp, stride_ks, stride_vp, stride_vs, factor, softcap, window,
            HEAD, HEAD_V, PAGE, False, CAPPED, WINDOW, False, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for start in tl.range(masked, high, BLOCK_N):
        acc, top, mass = attend_block(
            query, acc, top, mass, k_base, v_base, pages, page_table, start, high, position, 0,
            stride_kp, stride_ks, stride_vp, stride_vs, factor, softcap, window,
            HEAD, HEAD_V, PAGE, True, CAPPED, WINDOW, False, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    if SCALED == 1:
        acc = acc * tl.load(v_scale)
    if SCALED == 2:
        acc = acc * tl.load(v_scale + kv_head)
    at_out = index[:, None] * stride_ot + head[:, None] * stride_oh + (OWN + split) * stride_os + dv[None, :]
    tl.store(out + at_out, acc, mask=valid[:, None] & (dv < HEAD_V)[None, :])
    tl.store(lse + at_lse, tl.where(mass == 0.0, float("-inf"), top + tl.log2(mass)), mask=valid)


def attend(
    q_THD: Tensor,
    cache: Cache,
    batch: PagedBatch,
    call: AttentionCall,
    pages: SharedPages,
    parts: tuple[Tensor, Tensor],
    own: int,
    *,
    decode: bool,
    scales: tuple[Tensor, Tensor] | None,
) -> None:
    """Write the parts of the shared pages, behind each token's `own` ones, into `part_buffers`: by token in a decode
    step, else by place among `pages.members`."""
    _, heads, size = q_THD.shape
    k_cache, v_cache = cache
    kv_heads, page_size, size_v = v_cache.shape[1:]
    group, count = heads // kv_heads, pages.groups.shape[0]
    wide = q_THD.dtype == torch.float32
    block_d, block_dv = power_of_2(size), power_of_2(size_v)
    block_m = shared_tile(group, wide)[1]
    target, lse = parts
    tiles = pages.members.shape[0] // (block_m // power_of_2(group)) + count
    k_scale, v_scale = scales if scales is not None else (q_THD, q_THD)
    narrow = wide or max(block_d, block_dv) > 128
    _attend_shared[(tiles, kv_heads, splits_of(decode))](
        *(q_THD, k_cache, v_cache, batch.page_table),
        *(pages.group_start, pages.groups, pages.members, pages.positions, k_scale, v_scale),
        *(target, lse, count, call.scale, call.softcap if call.softcap else 1.0, call.window),
        *(*q_THD.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        *(batch.page_table.stride(0), *target.stride()[:3]),
        HEADS=heads,
        GROUP=group,
        GROUP_P2=power_of_2(group),
        HEAD=size,
        HEAD_V=size_v,
        PAGE=page_size,
        OWN=own,
        PARTS=own + splits_of(decode),
        COMPACT=not decode,
        CAPPED=call.softcap != 0.0,
        WINDOW=call.window > 0,
        SCALED=0 if scales is None else (1 if scales[0].numel() == 1 else 2),
        BLOCK_M=block_m,
        BLOCK_N=32 if narrow else 64,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=4,
        num_stages=2 if narrow else stages(3),
        **early(q_THD),
    )
