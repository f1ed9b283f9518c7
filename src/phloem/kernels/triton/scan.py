"""Selective scans: Mamba 1 (Gu and Dao, 2023) and Mamba 2 (Dao and Gu, 2024).

A scan goes through a row's tokens one after another, but a program that holds some channels' states in registers needs
no others. Mamba 2 has one decay for a whole head: rows of more than `SHORT` tokens go through chunks of tokens, whose
work is products of matrices, and the state is carried from one to the next within the program. Which of both a row
goes by depends on nothing but its own tokens. Legend beside that of `_base.py`: S state size, G groups, C channels.
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

from phloem.kernels.triton._base import ceil_div, power_of_2
from phloem.kernels.triton._states import Held, place_after, place_before
from phloem.kernels.triton.early import await_previous, early

if TYPE_CHECKING:
    from phloem.kernels.calls import PooledStates

SHORT = 8  # tokens of a row up to which Mamba 2 is computed one after another


@triton.jit
def _mamba2_tokens(
    x,
    dt,
    decay,
    b,
    c,
    skip,
    before,
    after,
    reads,
    writes,
    fresh,
    stride_state,
    out,
    query_start,
    stride_xt,
    stride_xh,
    stride_dt,
    stride_bt,
    stride_bg,
    stride_ct,
    stride_cg,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    STATE: tl.constexpr,
    MOST: tl.constexpr,
    POOLED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, heads, blocks of a head). MOST: rows of more tokens are left out; 0: none are."""
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    begin = tl.load(query_start + row).to(tl.int64)
    end = tl.load(query_start + row + 1).to(tl.int64)
    if MOST > 0 and end - begin > MOST:
        return
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    of_head = d < SIZE
    of_state = s < STATE
    both = of_head[:, None] & of_state[None, :]
    inside = head * SIZE * STATE + d[:, None] * STATE + s[None, :]
    place, there = place_before(reads, fresh, row, POOLED)
    old = (d < SIZE * there)[:, None] & of_state[None, :]
    held = tl.load(before + place * stride_state + inside, mask=old, other=0.0).to(tl.float32)
    group = head // SHARE
    rate = tl.load(decay + head).to(tl.float32)
    through = tl.load(skip + head).to(tl.float32)
    for t in tl.range(begin, end):
        given = tl.load(x + t * stride_xt + head * stride_xh + d, mask=of_head, other=0.0).to(tl.float32)
        key = tl.load(b + t * stride_bt + group * stride_bg + s, mask=of_state, other=0.0).to(tl.float32)
        query = tl.load(c + t * stride_ct + group * stride_cg + s, mask=of_state, other=0.0).to(tl.float32)
        step = tl.load(dt + t * stride_dt + head).to(tl.float32)
        held = held * tl.exp(step * rate) + (step * given)[:, None] * key[None, :]
        y = tl.sum(held * query[None, :], axis=1) + through * given
        tl.store(out + (t * HEADS + head) * SIZE + d, y.to(out.dtype.element_ty), mask=of_head)
    place = place_after(writes, row, POOLED)
    tl.store(after + place * stride_state + inside, held.to(after.dtype.element_ty), mask=both)


@triton.jit
def _mamba2_chunks(
    x,
    dt,
    decay,
    b,
    c,
    skip,
    before,
    after,
    reads,
    writes,
    fresh,
    stride_state,
    out,
    query_start,
    stride_xt,
    stride_xh,
    stride_dt,
    stride_bt,
    stride_bg,
    stride_ct,
    stride_cg,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    STATE: tl.constexpr,
    MOST: tl.constexpr,
    POOLED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, heads, blocks of a head); rows of up to MOST tokens are left out.

    With p the sum of dt * decay from a chunk's first token on: what token i takes from token j of its chunk is
    exp(p_i - p_j) dt_j (c_i . b_j) x_j, and from the state before the chunk exp(p_i) c_i h.
    """
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    begin = tl.load(query_start + row).to(tl.int64)
    end = tl.load(query_start + row + 1).to(tl.int64)
    if end - begin <= MOST:
        return
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    i = tl.arange(0, BLOCK_T)
    of_head = d < SIZE
    of_state = s < STATE
    inside = d[None, :] * STATE + s[:, None]
    place, there = place_before(reads, fresh, row, POOLED)
    old = of_state[:, None] & (d < SIZE * there)[None, :]
    first = before + place * stride_state + head * SIZE * STATE
    held = tl.load(first + inside, mask=old, other=0.0).to(tl.float32)  # [S, D]
    rate = tl.load(decay + head).to(tl.float32)
    through = tl.load(skip + head).to(tl.float32)
    # Numbers within a chunk fit 32 bits; where it begins does not.
    of_x = i[:, None] * stride_xt + d[None, :]
    of_b = i[:, None] * stride_bt + s[None, :]
    of_c = i[:, None] * stride_ct + s[None, :]
    of_out = i[:, None] * (HEADS * SIZE) + d[None, :]
    x += begin * stride_xt + head * stride_xh
    dt += begin * stride_dt + head
    b += begin * stride_bt + head // SHARE * stride_bg
    c += begin * stride_ct + head // SHARE * stride_cg
    out += begin * (HEADS * SIZE) + head * SIZE
    for left in tl.range((end - begin).to(tl.int32), 0, -BLOCK_T):
        some = i < left
        step = tl.load(dt + i * stride_dt, mask=some, other=0.0).to(tl.float32)
        given = tl.load(x + of_x, mask=some[:, None] & of_head[None, :], other=0.0)
        key = tl.load(b + of_b, mask=some[:, None] & of_state[None, :], other=0.0)
        query = tl.load(c + of_c, mask=some[:, None] & of_state[None, :], other=0.0)
        # What a token leaves less than exp(-64) of is gone; larger sums would lose what small ones behind them say.
        passed = tl.cumsum(tl.maximum(step * rate, -64.0), axis=0)
        whole = tl.sum(tl.where(i == BLOCK_T - 1, passed, 0.0), axis=0)
        y = tl.dot(query, held.to(query.dtype), input_precision="ieee") * tl.exp(passed)[:, None]
        # At most 0 where it counts: nothing overflows.
        since = tl.where(i[:, None] >= i[None, :], passed[:, None] - passed[None, :], float("-inf"))
        pairs = tl.dot(query, tl.trans(key), input_precision="ieee") * tl.exp(since) * step[None, :]
        y = tl.dot(pairs.to(given.dtype), given, y, input_precision="ieee") + through * given.to(tl.float32)
        tl.store(out + of_out, y.to(out.dtype.element_ty), mask=some[:, None] & of_head[None, :])
        # What a token leaves of itself, put on the narrow side of the product.
        stays = (given.to(tl.float32) * (tl.exp(whole - passed) * step)[:, None]).to(given.dtype)
        held = tl.dot(tl.trans(key), stays, held * tl.exp(whole), input_precision="ieee")
        x += BLOCK_T * stride_xt
        dt += BLOCK_T * stride_dt
        b += BLOCK_T * stride_bt
        c += BLOCK_T * stride_ct
        out += BLOCK_T * (HEADS * SIZE)
    if POOLED:
        tl.debug_barrier()  # a row may write where it read
    place = place_after(writes, row, POOLED)
    first = after + place * stride_state + head * SIZE * STATE
    tl.store(first + inside, held.to(after.dtype.element_ty), mask=of_state[:, None] & of_head[None, :])


def _chunk(block_s: int) -> tuple[int, int, int]:
    """(Tokens of a chunk, numbers of a head, warps) that keep what a program holds in registers."""
    if torch.version.hip:
        return 16, 32 if block_s <= 128 else 16, 4
    return max(16, min(64, 4096 // block_s)), 64 if block_s <= 128 else 32, 8


def mamba2_scan(
    x_THD: Tensor,
    dt_TH: Tensor,
    decay_H: Tensor,
    b_TGS: Tensor,
    c_TGS: Tensor,
    skip_H: Tensor,
    state_RHDS: Tensor | PooledStates,
    query_start: Tensor,
    short: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `reference_scan.mamba2_scan`; None for states that lie in a pool. `short`: rows of more tokens go by chunks,
    where the state is rounded to the type of x before products; 0: no row does; None: `SHORT`, and 0 in float32."""
    tokens, heads, size = x_THD.shape
    groups, state = b_TGS.shape[1:]
    held = Held(state_RHDS, query_start)
    out = torch.empty((tokens, heads, size), dtype=x_THD.dtype, device=x_THD.device)
    if not held.rows:
        return out, held.result
    if short is None:
        short = SHORT if x_THD.element_size() <= 2 else 0
    by_chunks = 0 < short < tokens and tokens > held.rows
    strides = *x_THD.stride()[:2], dt_TH.stride(0), *b_TGS.stride()[:2], *c_TGS.stride()[:2]
    given = x_THD, dt_TH, decay_H, b_TGS, c_TGS, skip_H, *held.arguments(), out, query_start, *strides
    sizes = {"HEADS": heads, "SHARE": heads // groups, "SIZE": size, "STATE": state, "POOLED": held.pooled}
    block_s = power_of_2(state)
    # A program's share of the state is 4,096 numbers at most, 32 registers of each of 128 threads.
    block_d = max(1, min(power_of_2(size), 4096 // block_s))
    grid = held.rows, heads, ceil_div(size, block_d)
    most = short if by_chunks else 0
    _mamba2_tokens[grid](*given, **sizes, MOST=most, BLOCK_D=block_d, BLOCK_S=block_s, **early(out))
    if by_chunks:
        block_t, block_d, warps = _chunk(max(16, block_s))
        block_d = max(16, min(power_of_2(size), block_d))
        _mamba2_chunks[(held.rows, heads, ceil_div(size, block_d))](
            *given,
            **sizes,
            MOST=short,
            BLOCK_D=block_d,
            BLOCK_S=max(16, block_s),
            BLOCK_T=block_t,
            num_warps=warps,
            num_stages=2 if warps == 8 else 1,
            **early(out),
        )
    return out, held.result


@triton.jit
def _given(x, dt, b, c, t, end, channel, s, stride_xt, stride_dt, stride_bt, stride_ct, some, of_state):
    """A token's x, step, b and c, float32; zeros, which change nothing, behind a row's last."""
    some = some & (channel * 0 + t < end)
    of_state = of_state & (s * 0 + t < end)
    given = tl.load(x + t * stride_xt + channel, mask=some, other=0.0).to(tl.float32)
    step = tl.load(dt + t * stride_dt + channel, mask=some, other=0.0).to(tl.float32)
    key = tl.load(b + t * stride_bt + s, mask=of_state, other=0.0).to(tl.float32)
    query = tl.load(c + t * stride_ct + s, mask=of_state, other=0.0).to(tl.float32)
    return given, step, key, query


@triton.jit
def _taken(held, rates, through, given, step, key, query):
    """(The state with a token, its y)."""
    held = held * tl.exp(step[:, None] * rates) + (step * given)[:, None] * key[None, :]
    return held, tl.sum(held * query[None, :], axis=1) + through * given


@triton.jit
def _selective_scan(
    x,
    dt,
    decay,
    b,
    c,
    skip,
    before,
    after,
    reads,
    writes,
    fresh,
    stride_state,
    out,
    query_start,
    stride_xt,
    stride_dt,
    stride_bt,
    stride_ct,
    channels,
    STATE: tl.constexpr,
    POOLED: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, blocks of channels). ONE: rows are of about one token; else four are read before any is computed, so
    that their reads overlap."""
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    some = channel < channels
    of_state = s < STATE
    both = some[:, None] & of_state[None, :]
    inside = channel[:, None] * STATE + s[None, :]
    begin = tl.load(query_start + row).to(tl.int64)
    end = tl.load(query_start + row + 1).to(tl.int64)
    place, there = place_before(reads, fresh, row, POOLED)
    old = (channel < channels * there)[:, None] & of_state[None, :]
    held = tl.load(before + place * stride_state + inside, mask=old, other=0.0).to(tl.float32)
    rates = tl.load(decay + inside, mask=both, other=0.0).to(tl.float32)
    through = tl.load(skip + channel, mask=some, other=0.0).to(tl.float32)
    at = out + channel
    if ONE:
        for t in tl.range(begin, end):
            g, p, k, q = _given(
                x, dt, b, c, t, end, channel, s, stride_xt, stride_dt, stride_bt, stride_ct, some, of_state
            )
            held, y = _taken(held, rates, through, g, p, k, q)
            tl.store(at + t * channels, y.to(out.dtype.element_ty), mask=some)
    else:
        for t in tl.range(begin, end, 4):
            g0, p0, k0, q0 = _given(
                x, dt, b, c, t, end, channel, s, stride_xt, stride_dt, stride_bt, stride_ct, some, of_state
            )
            g1, p1, k1, q1 = _given(
                x, dt, b, c, t + 1, end, channel, s, stride_xt, stride_dt, stride_bt, stride_ct, some, of_state
            )
            g2, p2, k2, q2 = _given(
                x, dt, b, c, t + 2, end, channel, s, stride_xt, stride_dt, stride_bt, stride_ct, some, of_state
            )
            g3, p3, k3, q3 = _given(
                x, dt, b, c, t + 3, end, channel, s, stride_xt, stride_dt, stride_bt, stride_ct, some, of_state
            )
            held, y = _taken(held, rates, through, g0, p0, k0, q0)
            tl.store(at + t * channels, y.to(out.dtype.element_ty), mask=some)
            held, y = _taken(held, rates, through, g1, p1, k1, q1)
            tl.store(at + (t + 1) * channels, y.to(out.dtype.element_ty), mask=some & (channel * 0 + t + 1 < end))
            held, y = _taken(held, rates, through, g2, p2, k2, q2)
            tl.store(at + (t + 2) * channels, y.to(out.dtype.element_ty), mask=some & (channel * 0 + t + 2 < end))
            held, y = _taken(held, rates, through, g3, p3, k3, q3)
            tl.store(at + (t + 3) * channels, y.to(out.dtype.element_ty), mask=some & (channel * 0 + t + 3 < end))
    place = place_after(writes, row, POOLED)
    tl.store(after + place * stride_state + inside, held.to(after.dtype.element_ty), mask=both)


def selective_scan(
    x_TC: Tensor,
    dt_TC: Tensor,
    decay_CS: Tensor,
    b_TS: Tensor,
    c_TS: Tensor,
    skip_C: Tensor,
    state_RCS: Tensor | PooledStates,
    query_start: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """As `reference_scan.selective_scan`; None for states that lie in a pool."""
    tokens, channels = x_TC.shape
    held = Held(state_RCS, query_start)
    out = torch.empty((tokens, channels), dtype=x_TC.dtype, device=x_TC.device)
    if held.rows:
        block_s = power_of_2(decay_CS.shape[1])
        # Small programs of one warp: there are as many channels as keep a device busy, and tokens come one by one.
        block_c = max(1, min(power_of_2(channels), 512 // block_s))
        _selective_scan[(held.rows, ceil_div(channels, block_c))](
            x_TC,
            dt_TC,
            decay_CS.contiguous(),
            b_TS,
            c_TS,
            skip_C,
            *held.arguments(),
            out,
            query_start,
            x_TC.stride(0),
            dt_TC.stride(0),
            b_TS.stride(0),
            c_TS.stride(0),
            channels,
            STATE=decay_CS.shape[1],
            POOLED=held.pooled,
            ONE=tokens == held.rows,
            BLOCK_C=block_c,
            BLOCK_S=block_s,
            num_warps=1,
            **early(out),
        )
    return out, held.result
