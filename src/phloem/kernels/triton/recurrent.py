"""Recurrent mixers: the causal convolution before them, and gated delta nets, with a decay for each head (Yang et al.,
2024) or for each channel of a key (Kimi Delta Attention, 2025).

A delta net goes through a row's tokens one after another, but every column of its state, one number of a value, is
independent of the others: a program holds some columns in registers from a row's first token to its last. Legend beside
that of `_base.py`: R rows, S key size, D value size, C channels, W taps.
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

from phloem.kernels.triton._base import ceil_div, find_row, power_of_2, silu
from phloem.kernels.triton._states import Held, place_after, place_before
from phloem.kernels.triton.early import await_previous, early

if TYPE_CHECKING:
    from phloem.kernels.calls import PooledStates

_TOKENS = 16  # of one row, of one program of the convolution


@triton.jit
def _gated_delta(
    q,
    k,
    v,
    decay,
    beta,
    before,
    after,
    reads,
    writes,
    fresh,
    stride_state,
    out,
    query_start,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_bt,
    HEADS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    EACH: tl.constexpr,
    POOLED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, heads, blocks of a value's numbers). EACH: a decay for every channel of a key."""
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    of_key = s < KEY
    of_value = d < VALUE
    both = of_key[:, None] & of_value[None, :]
    inside = head * KEY * VALUE + s[:, None] * VALUE + d[None, :]
    place, there = place_before(reads, fresh, row, POOLED)
    old = (s < KEY * there)[:, None] & of_value[None, :]
    held = tl.load(before + place * stride_state + inside, mask=old, other=0.0).to(tl.float32)
    begin = tl.load(query_start + row).to(tl.int64)
    end = tl.load(query_start + row + 1).to(tl.int64)
    for t in tl.range(begin, end):
        query = tl.load(q + t * stride_qt + head * stride_qh + s, mask=of_key, other=0.0).to(tl.float32)
        key = tl.load(k + t * stride_kt + head * stride_kh + s, mask=of_key, other=0.0).to(tl.float32)
        value = tl.load(v + t * stride_vt + head * stride_vh + d, mask=of_value, other=0.0).to(tl.float32)
        written = tl.load(beta + t * stride_bt + head).to(tl.float32)
        if EACH:
            kept = tl.exp(tl.load(decay + t * stride_gt + head * stride_gh + s, mask=of_key, other=0.0).to(tl.float32))
            held = held * kept[:, None]
        else:
            held = held * tl.exp(tl.load(decay + t * stride_gt + head).to(tl.float32))
        change = (value - tl.sum(held * key[:, None], axis=0)) * written
        held = held + key[:, None] * change[None, :]
        y = tl.sum(held * query[:, None], axis=0) * scale
        tl.store(out + (t * HEADS + head) * VALUE + d, y.to(out.dtype.element_ty), mask=of_value)
    place = place_after(writes, row, POOLED)
    tl.store(after + place * stride_state + inside, held.to(after.dtype.element_ty), mask=both)


def gated_delta(
    q_THS: Tensor,
    k_THS: Tensor,
    v_THD: Tensor,
    decay_TH: Tensor,
    beta_TH: Tensor,
    state_RHSD: Tensor | PooledStates,
    query_start: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """As `reference_scan.gated_delta`, and None for states that lie in a pool; a token's sums run in another order."""
    heads, value = v_THD.shape[1:]
    held, key, each = Held(state_RHSD, query_start), q_THS.shape[2], decay_TH.dim() == 3
    out = torch.empty(v_THD.shape, dtype=v_THD.dtype, device=v_THD.device)
    block_s = power_of_2(key)
    # A program's share of the state is 4,096 numbers at most, 32 registers of each of 128 threads.
    block_d = max(1, min(power_of_2(value), 4096 // block_s))
    if held.rows:
        _gated_delta[(held.rows, heads, ceil_div(value, block_d))](
            q_THS,
            k_THS,
            v_THD,
            decay_TH,
            beta_TH,
            *held.arguments(),
            out,
            query_start,
            scale,
            q_THS.stride(0),
            q_THS.stride(1),
            k_THS.stride(0),
            k_THS.stride(1),
            v_THD.stride(0),
            v_THD.stride(1),
            decay_TH.stride(0),
            decay_TH.stride(1),
            beta_TH.stride(0),
            HEADS=heads,
            KEY=key,
            VALUE=value,
            EACH=each,
            POOLED=held.pooled,
            BLOCK_S=block_s,
            BLOCK_D=block_d,
            **early(out),
        )
    return out, held.result


@triton.jit(do_not_specialize=["rows"])
def _causal_conv(
    x,
    weight,
    bias,
    before,
    after,
    reads,
    writes,
    fresh,
    stride_state,
    out,
    query_start,
    rows,
    stride_x,
    channels,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    POOLED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of tokens, blocks of channels). A row's first tile also writes what the next step needs."""
    await_previous(PDL)
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    some = c < channels
    row = find_row(query_start, tile, rows, BLOCK_T)
    begin = tl.load(query_start + row)
    tokens = tl.load(query_start + row + 1) - begin
    first = (tile - (begin // BLOCK_T + row)) * BLOCK_T
    kept = c * (WIDTH - 1)
    place, there = place_before(reads, fresh, row, POOLED)
    seen = before + place * stride_state
    if first < tokens:
        t = first + tl.arange(0, BLOCK_T)
        acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        if HAS_BIAS:
            acc += tl.load(bias + c, mask=some, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(WIDTH):
            at = t - (WIDTH - 1) + j
            is_new = ((at >= 0) & (t < tokens))[:, None] & some[None, :]
            is_old = (at < 0)[:, None] & (c < channels * there)[None, :]
            source = x + (begin + at).to(tl.int64)[:, None] * stride_x + c[None, :]
            new = tl.load(source, mask=is_new, other=0.0).to(tl.float32)
            old = tl.load(seen + kept[None, :] + (at + WIDTH - 1)[:, None], mask=is_old, other=0.0).to(tl.float32)
            factor = tl.load(weight + c * WIDTH + j, mask=some, other=0.0).to(tl.float32)
            acc += (new + old) * factor[None, :]
        if SILU:
            acc = silu(acc)
        target = out + (begin + t).to(tl.int64)[:, None] * channels + c[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=(t < tokens)[:, None] & some[None, :])
    if first == 0:
        if POOLED:
            tl.debug_barrier()  # a row may write where it read
        place = place_after(writes, row, POOLED)
        for j in tl.static_range(WIDTH - 1):
            # Of the row's new tokens; below 0: one of an earlier step. The same for every channel.
            at = c * 0 + (tokens - (WIDTH - 1) + j)
            source = x + (begin + at).to(tl.int64) * stride_x + c
            new = tl.load(source, mask=some & (at >= 0), other=0.0).to(tl.float32)
            old = tl.load(seen + kept + (tokens + j), mask=(c < channels * there) & (at < 0), other=0.0).to(tl.float32)
            value = tl.where(at >= 0, new, old).to(after.dtype.element_ty)
            tl.store(after + place * stride_state + kept + j, value, mask=some)


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    state_RCW: Tensor | PooledStates,
    query_start: Tensor,
    silu: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """As `reference_scan.causal_conv`, and None for states that lie in a pool."""
    tokens, channels = x_TC.shape
    held, block_c = Held(state_RCW, query_start), min(128, power_of_2(channels))
    out = torch.empty((tokens, channels), dtype=x_TC.dtype, device=x_TC.device)
    if held.rows:
        _causal_conv[(tokens // _TOKENS + held.rows, ceil_div(channels, block_c))](
            x_TC,
            weight_CW.contiguous(),
            weight_CW if bias_C is None else bias_C,
            *held.arguments(),
            out,
            query_start,
            held.rows,
            x_TC.stride(0),
            channels,
            WIDTH=weight_CW.shape[1],
            HAS_BIAS=bias_C is not None,
            SILU=silu,
            POOLED=held.pooled,
            BLOCK_T=_TOKENS,
            BLOCK_C=block_c,
            **early(out),
        )
    return out, held.result
