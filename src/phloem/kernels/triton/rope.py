"""Rotary embedding in place, KV write into pages, and both in one pass.

Caches are `[pages, K, S, D]` in the activations' type or in float8 (e4m3), then with a float32 scale per tensor (one
element) or per kv head: what is stored is value / scale.
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

from phloem.kernels.triton._base import ceil_div, fp8_limit, power_of_2
from phloem.kernels.triton.early import await_previous, early

if TYPE_CHECKING:
    from phloem.kernels.ops import Rotation


@triton.jit
def _store_kv(cache, at, value, scale, head, keep, SCALED: tl.constexpr, LIMIT: tl.constexpr):
    """Store a [heads, features] tile; SCALED 0: as it is, 1: one scale, 2: one per head. LIMIT above 0 saturates."""
    if SCALED == 1:
        value = value / tl.load(scale)
    if SCALED == 2:
        value = value / tl.load(scale + head, mask=keep, other=1.0)
    if LIMIT > 0:
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
    tl.store(cache + at, value.to(cache.dtype.element_ty), mask=keep)


@triton.jit
def _inverse_rms(at, size, eps, rows, BLOCK_D: tl.constexpr):
    """1 / RMS of each head of a tile, [heads, 1], summed as `norm.rms_norm` sums."""
    col = tl.arange(0, BLOCK_D)[None, :]
    wide = tl.load(at + col, mask=rows & (col < size), other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, axis=1) / size + eps)[:, None]


@triton.jit
def _normed(at, offset, weight, inverse, keep):
    """Elements of heads as their norm gives them, rounded to the tensor's type, in float32."""
    value = tl.load(at + offset, mask=keep, other=0.0)
    scale = tl.load(weight + offset, mask=keep, other=0.0).to(tl.float32)
    return (value.to(tl.float32) * inverse * scale).to(value.dtype).to(tl.float32)


@triton.jit
def _rope_kv(
    q,
    k,
    v,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    slots,
    k_scale,
    v_scale,
    q_norm,
    k_norm,
    eps,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kp,
    stride_kk,
    stride_ks,
    stride_vp,
    stride_vk,
    stride_vs,
    page_size,
    q_heads,
    kv_heads,
    q_blocks,
    k_blocks,
    half,
    k_size,
    v_size,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WRITE: tl.constexpr,
    SCALED: tl.constexpr,
    LIMIT: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, blocks of heads): first those of q (rotated in place), then of k, then of v (written to its page).

    Without WRITE, k is rotated in place as well; without ROTATE only the write happens. NORM (with both): q and k are
    normalised by head before.
    """
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    is_q = block < q_blocks
    is_k = (block >= q_blocks) & (block < q_blocks + k_blocks)
    heads = tl.where(is_q, q_heads, kv_heads)
    first_block = tl.where(is_q, 0, tl.where(is_k, q_blocks, q_blocks + k_blocks))
    head = ((block - first_block) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    if WRITE:
        slot = tl.load(slots + token).to(tl.int64)
        page = slot // page_size
        offset = slot % page_size
    if ROTATE:  # noqa: SIM102 - a compile-time branch around a run-time one
        if is_q | is_k:
            pair = tl.arange(0, BLOCK_HALF)[None, :]
            position = tl.load(positions + token).to(tl.int64)
            turn = cos_sin + position * (2 * half) + pair
            cos = tl.load(turn, mask=pair < half, other=0.0)
            sin = tl.load(turn + half, mask=pair < half, other=0.0)
            first = 2 * pair if INTERLEAVED else pair
            second = 2 * pair + 1 if INTERLEAVED else pair + half
            keep = (head < heads) & (pair < half)
            if is_q:
                at = q + token * stride_qt + head * stride_qh
                if NORM:
                    inverse = _inverse_rms(at, k_size, eps, head < heads, BLOCK_D)
                    a = _normed(at, first, q_norm, inverse, keep)
                    b = _normed(at, second, q_norm, inverse, keep)
                    rest = tl.arange(0, BLOCK_D)[None, :]
                    behind = (head < heads) & (rest >= 2 * half) & (rest < k_size)
                    tail = _normed(at, rest, q_norm, inverse, behind)
                    tl.store(at + rest, tail.to(q.dtype.element_ty), mask=behind)
                else:
                    a = tl.load(at + first, mask=keep, other=0.0).to(tl.float32)
                    b = tl.load(at + second, mask=keep, other=0.0).to(tl.float32)
                tl.store(at + first, (a * cos - b * sin).to(q.dtype.element_ty), mask=keep)
                tl.store(at + second, (b * cos + a * sin).to(q.dtype.element_ty), mask=keep)
            else:
                at = k + token * stride_kt + head * stride_kh
                if NORM:
                    inverse = _inverse_rms(at, k_size, eps, head < heads, BLOCK_D)
                    a = _normed(at, first, k_norm, inverse, keep)
                    b = _normed(at, second, k_norm, inverse, keep)
                else:
                    a = tl.load(at + first, mask=keep, other=0.0).to(tl.float32)
                    b = tl.load(at + second, mask=keep, other=0.0).to(tl.float32)
                low = (a * cos - b * sin).to(k.dtype.element_ty)
                high = (b * cos + a * sin).to(k.dtype.element_ty)
                if WRITE:
                    to = page * stride_kp + head * stride_kk + offset * stride_ks
                    _store_kv(k_cache, to + first, low.to(tl.float32), k_scale, head, keep, SCALED, LIMIT)
                    _store_kv(k_cache, to + second, high.to(tl.float32), k_scale, head, keep, SCALED, LIMIT)
                else:
                    tl.store(at + first, low, mask=keep)
                    tl.store(at + second, high, mask=keep)
    if WRITE:
        col = tl.arange(0, BLOCK_D)[None, :]
        if is_k:
            # What rotation leaves alone: all of k when there is none, else the tail behind the rotary part.
            start = 2 * half if ROTATE else 0
            keep = (head < kv_heads) & (col >= start) & (col < k_size)
            at_k = k + token * stride_kt + head * stride_kh
            if NORM:
                value = _normed(at_k, col, k_norm, _inverse_rms(at_k, k_size, eps, head < kv_heads, BLOCK_D), keep)
            else:
                value = tl.load(at_k + col, mask=keep, other=0.0).to(tl.float32)
            to = page * stride_kp + head * stride_kk + offset * stride_ks + col
            _store_kv(k_cache, to, value, k_scale, head, keep, SCALED, LIMIT)
        if block >= q_blocks + k_blocks:
            keep = (head < kv_heads) & (col < v_size)
            value = tl.load(v + token * stride_vt + head * stride_vh + col, mask=keep, other=0.0).to(tl.float32)
            to = page * stride_vp + head * stride_vk + offset * stride_vs + col
            _store_kv(v_cache, to, value, v_scale, head, keep, SCALED, LIMIT)


def _launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor | None,
    interleaved: bool,
    caches: tuple[Tensor, Tensor] | None,
    slots: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    tokens, kv_heads, k_size = k.shape
    if tokens == 0:
        return
    q_heads = q.shape[1] if q is not None else 0
    half = cos_sin.shape[-1] if cos_sin is not None else 1
    k_cache, v_cache = caches if caches is not None else (k, k)
    query, value = q if q is not None else k, v if v is not None else k
    v_size = value.shape[2]
    block_h = min(8, power_of_2(max(q_heads, kv_heads)))
    q_blocks, k_blocks = ceil_div(q_heads, block_h), ceil_div(kv_heads, block_h)
    blocks = q_blocks + k_blocks * (2 if caches is not None else 1)
    paged = k_cache.dim() == 4
    k_scale, v_scale = scales if scales is not None else (k, k)
    q_norm, k_norm, eps = norms if norms is not None else (k, k, 0.0)
    _rope_kv[(tokens, blocks)](
        *(query, k, value, positions, cos_sin if cos_sin is not None else k, k_cache, v_cache),
        *(slots if slots is not None else positions, k_scale, v_scale, q_norm, k_norm, eps),
        *(*query.stride()[:2], *k.stride()[:2], *value.stride()[:2]),
        *(k_cache.stride()[:3] if paged else (0, 0, 0)),
        *(v_cache.stride()[:3] if paged else (0, 0, 0)),
        k_cache.shape[2] if paged else 1,
        *(q_heads, kv_heads, q_blocks, k_blocks, half, k_size, v_size),
        ROTATE=cos_sin is not None,
        INTERLEAVED=interleaved,
        WRITE=caches is not None,
        SCALED=0 if scales is None else (1 if scales[0].numel() == 1 else 2),
        LIMIT=fp8_limit(k_cache.dtype),
        NORM=norms is not None,
        BLOCK_H=block_h,
        BLOCK_HALF=power_of_2(half),
        BLOCK_D=power_of_2(max(k_size, v_size)),
        num_warps=4,
        **early(k),
    )


def rope_(q_THD: Tensor, k_TKD: Tensor, positions_T: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """Rotate q and k in place by float32 cos_sin[positions, 2, rotary / 2]; halves or neighbours are paired."""
    _launch(q_THD, k_TKD, None, positions_T, cos_sin, interleaved, None, None, None)


def write_kv(
    k_TKD: Tensor,
    v_TKD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Store new tokens' k and v at slots (page * S + offset), divided by `scales` (k, v; one or K elements each)."""
    _launch(None, k_TKD, v_TKD, slots_T, None, False, (k_cache, v_cache), slots_T, scales)


def rope_write_kv(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    rotation: Rotation,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`rms_norm` of the heads if asked for, `rope_`, then `write_kv`, in one pass: q is changed in place and given
    back; k goes normalised and rotated to its page alone.
    """
    norms = None
    if rotation.q_norm is not None and rotation.k_norm is not None:
        norms = rotation.q_norm, rotation.k_norm, rotation.eps
    caches, turn = (k_cache, v_cache), (rotation.positions, rotation.cos_sin, rotation.interleaved)
    _launch(q_THD, k_TKD, v_TKD, *turn, caches, slots_T, scales, norms)
    return q_THD


@triton.jit(do_not_specialize=["stride_p"])
def _mrope_table(
    positions, cos_sin, out, stride_p, stride_c, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TIME: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tokens). TIME, HEIGHT, WIDTH: pairs that turn by each."""
    await_previous(PDL)
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if INTERLEAVED:
        axis = tl.where((i % 3 == 1) & (i < 3 * HEIGHT), 1, tl.where((i % 3 == 2) & (i < 3 * WIDTH), 2, 0))
    else:
        axis = (i >= TIME).to(tl.int32) + (i >= TIME + HEIGHT).to(tl.int32)
    some = i < HALF
    at = cos_sin + tl.load(positions + axis * stride_p + t, mask=some, other=0) * stride_c + i
    out += t * 2 * HALF
    tl.store(out + i, tl.load(at, mask=some, other=0.0), mask=some)
    tl.store(out + HALF + i, tl.load(at + HALF, mask=some, other=0.0), mask=some)


def mrope_table(
    positions_3T: Tensor, cos_sin: Tensor, sections: tuple[int, ...], interleaved: bool
) -> tuple[Tensor, Tensor]:
    """As `reference_models.mrope_table`."""
    tokens, half = positions_3T.shape[1], cos_sin.shape[2]
    out = torch.empty((tokens, 2, half), dtype=cos_sin.dtype, device=cos_sin.device)
    if tokens:
        time, height, width = sections
        _mrope_table[(tokens,)](
            positions_3T, cos_sin, out, positions_3T.stride(0), cos_sin.stride(0),
            HEIGHT=height, WIDTH=width, TIME=time, INTERLEAVED=interleaved, HALF=half, BLOCK=power_of_2(half),
            num_warps=1, **early(out),
        )  # fmt: skip
    return torch.arange(tokens, device=cos_sin.device), out
