"""One block of keys and values in an online softmax: what every paged attention kernel loops over."""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from phloem.kernels.triton._base import soften, tanh, widened


@triton.jit
def attend_block(
    q,
    acc,
    top,
    mass,
    k_base,
    v_base,
    pages,
    tree_row,
    start,
    end,
    position,
    prefix,
    stride_kp,
    stride_ks,
    stride_vp,
    stride_vs,
    factor,
    softcap,
    window,
    HEAD: tl.constexpr,
    HEAD_V: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One KV block's part of the online softmax. `factor` holds scale * log2(e), or the plain scale when CAPPED."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    inside = n < end
    page = tl.load(pages + n // PAGE, mask=inside, other=0).to(tl.int64)
    at_k = page * stride_kp + (n % PAGE) * stride_ks
    at_v = page * stride_vp + (n % PAGE) * stride_vs
    k = tl.load(k_base + at_k[None, :] + d[:, None], mask=inside[None, :] & (d < HEAD)[:, None], other=0.0)
    scores = tl.dot(q, widened(k, q), input_precision="ieee") * factor
    if CAPPED:
        scores = tanh(scores / softcap) * (softcap * 1.4426950408889634)
    if MASKED:
        seen = inside[None, :]
        if TREE:
            within = n - prefix
            drafted = tl.load(
                tree_row[:, None] + within[None, :], mask=inside[None, :] & (within >= 0)[None, :], other=1
            )
            seen = seen & (drafted != 0)
        else:
            seen = seen & (n[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    weights, shrink, new_top, mass = soften(scores, top, mass)
    v = tl.load(v_base + at_v[:, None] + dv[None, :], mask=inside[:, None] & (dv < HEAD_V)[None, :], other=0.0)
    acc = tl.dot(weights.to(q.dtype), widened(v, q), acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, mass
