"""`grouped.py` for a few tokens: every pair reads its expert's rows for itself, in two launches.

Nothing is sorted and no tile is filled. Products are sums over vectors in float32, of weights that are not rounded.
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

from phloem.kernels.triton._base import ceil_div, power_of_2, stages
from phloem.kernels.triton.early import await_previous, early
from phloem.kernels.triton.grouped import Pair, activated
from phloem.kernels.triton.nibbles import Stack, number_of, scales_at, shift_of, step_of
from phloem.kernels.triton.route import choose

BLOCK_N = 16


@triton.jit
def _dot_rows(
    at_x,
    weight,
    scale,
    zero,
    row,
    inside,
    end,
    stride_w,
    stride_sg,
    WIDTH: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_N]: products of rows of the weight with one vector of `end` features. scale, zero: of each row's
    first group."""
    if WIDTH == 0:
        k = tl.arange(0, BLOCK_K)
        at_w = weight + row[:, None] * stride_w + k[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, end, BLOCK_K):
            some = start + k < end
            a = tl.load(at_x + start + k, mask=some, other=0.0).to(tl.float32)
            b = tl.load(at_w + start, mask=inside[:, None] & some[None, :], other=0.0).to(tl.float32)
            acc += b * a[None, :]
        return tl.sum(acc, axis=1)
    else:
        HALF: tl.constexpr = GROUP // 2
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        group, within = tl.arange(0, GROUPS), tl.arange(0, HALF)
        k = group[:, None] * GROUP + within[None, :]
        at_w = weight + row[:, None, None] * stride_w + (group[None, :, None] * HALF + within[None, None, :])
        total = tl.zeros([BLOCK_N, GROUPS, HALF], tl.float32)
        step, origin = scales_at(scale, zero, 0, end, inside, group, stride_sg, ZEROS, GROUP)
        whole = inside[:, None] & (group * GROUP < end)[None, :]
        both = tl.load(at_w, mask=tl.broadcast_to(whole[:, :, None], [BLOCK_N, GROUPS, HALF]), other=0)
        for start in range(0, end, BLOCK_K):
            # What is needed next is asked for before this turn's sums: nothing else has it come in the background.
            ahead = start + BLOCK_K
            next_step, next_origin = scales_at(scale, zero, ahead, end, inside, group, stride_sg, ZEROS, GROUP)
            whole = inside[:, None] & (ahead + group * GROUP < end)[None, :]
            there = tl.broadcast_to(whole[:, :, None], [BLOCK_N, GROUPS, HALF])
            next_both = tl.load(at_w + ahead // 2, mask=there, other=0)
            some = start + k < end
            low = tl.load(at_x + start + k, mask=some, other=0.0).to(tl.float32)
            high = tl.load(at_x + start + HALF + k, mask=some, other=0.0).to(tl.float32)
            scale_of = step_of(step, WIDTH)
            part = number_of(both & 15, WIDTH) * low[None, :, :] + number_of(both >> 4, WIDTH) * high[None, :, :]
            part = part * scale_of[:, :, None]
            if WIDTH == 1:
                part -= (low + high)[None, :, :] * shift_of(scale_of, origin, ZEROS)[:, :, None]
            total += part
            both, step, origin = next_both, next_step, next_origin
        return tl.sum(tl.sum(total, axis=2), axis=1)


@triton.jit
def _few_up_any(
    x,
    weight,
    scale,
    zero,
    bias,
    ids,
    routing,
    logits,
    out,
    features_in,
    features_out,
    experts,
    limit,
    alpha,
    stride_logits,
    stride_x,
    stride_w,
    stride_se,
    stride_sg,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHED: tl.constexpr,
    BIASED: tl.constexpr,
    ROUTE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    WIDTH: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of output features): the first product of one pair, activated. ROUTE: `ids` and `routing` are
    found here, by each program for itself, and written for the second product."""
    await_previous(PDL)
    pair = tl.program_id(0).to(tl.int64)
    if ROUTE:
        at_logits = logits + pair // CHOICES * stride_logits
        place, value = choose(at_logits, experts, (pair % CHOICES).to(tl.int32), CHOICES, RENORMALISE, BLOCK_E)
        if tl.program_id(1) == 0:
            tl.store(ids + pair, place)
            tl.store(routing + pair, value)
        expert = place.to(tl.int64)
    else:
        expert = tl.load(ids + pair).to(tl.int64)
    there = (expert >= 0) & (expert < experts)
    expert = tl.where(there, expert, 0)
    end = tl.where(there, features_in, 0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = col < features_out
    row = expert * features_out * (2 if GATED else 1) + col
    at_x = x + pair // CHOICES * stride_x
    to_s = expert * stride_se + col
    gate = _dot_rows(at_x, weight, scale + to_s, zero + to_s, row, inside, end, stride_w, stride_sg,
                     WIDTH, ZEROS, GROUP, BLOCK_N, BLOCK_K)  # fmt: skip
    up = gate
    if GATED:
        to_s += features_out
        up = _dot_rows(at_x, weight, scale + to_s, zero + to_s, row + features_out, inside, end, stride_w, stride_sg,
                       WIDTH, ZEROS, GROUP, BLOCK_N, BLOCK_K)  # fmt: skip
    if WEIGHED == 1:
        weigh = tl.load(routing + pair)
        gate *= weigh
        up *= weigh
    if BIASED:
        gate += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + row + features_out, mask=inside, other=0.0).to(tl.float32)
    result = activated(gate, up, limit, alpha, KIND, GATED)
    tl.store(out + pair * features_out + col, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _few_down_any(
    x,
    weight,
    scale,
    zero,
    bias,
    ids,
    routing,
    out,
    features_in,
    features_out,
    experts,
    stride_w,
    stride_se,
    stride_sg,
    CHOICES: tl.constexpr,
    WEIGHED: tl.constexpr,
    BIASED: tl.constexpr,
    WIDTH: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens, blocks of output features): the sum over a token's choices, in their order."""
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = col < features_out
    total = tl.zeros([BLOCK_N], tl.float32)
    for choice in range(CHOICES):
        pair = token * CHOICES + choice
        expert = tl.load(ids + pair).to(tl.int64)
        there = (expert >= 0) & (expert < experts)
        expert = tl.where(there, expert, 0)
        row, to_s = expert * features_out + col, expert * stride_se + col
        end = tl.where(there, features_in, 0)
        at_x = x + pair * features_in
        one = _dot_rows(at_x, weight, scale + to_s, zero + to_s, row, inside, end, stride_w, stride_sg,
                        WIDTH, ZEROS, GROUP, BLOCK_N, BLOCK_K)  # fmt: skip
        if BIASED:
            one += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        if WEIGHED == 2:
            one *= tl.load(routing + pair)
        total += tl.where(there, one, 0.0)
    tl.store(out + token * features_out + col, total.to(out.dtype.element_ty), mask=inside)


def _widths(stack: Stack) -> dict[str, int | bool]:
    return {
        "WIDTH": stack.width, "ZEROS": stack.zero is not None, "GROUP": stack.group, "BLOCK_N": BLOCK_N,
        "BLOCK_K": 256 if stack.scale is None else 512,
    }  # fmt: skip


def few_any(
    x_TN: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    pair: Pair,
    logits_TE: Tensor | None = None,
    renormalise: bool = False,
) -> Tensor:
    """What experts make of a few tokens, summed, [T, N]; ids of no expert here add nothing. With `logits_TE` weights
    and ids are not known yet, and become what `route` finds."""
    tokens, features = x_TN.shape
    choices, shape, biases = ids_Tk.shape[1], pair.shape, pair.biases
    hidden = torch.empty((tokens * choices, pair.between), dtype=x_TN.dtype, device=x_TN.device)
    out_TN = torch.empty((tokens, features), dtype=x_TN.dtype, device=x_TN.device)
    first, second = pair.first.arguments(), pair.second.arguments()
    launch = {"num_warps": 4, "num_stages": stages(3), **early(x_TN)}
    _few_up_any[(tokens * choices, ceil_div(pair.between, BLOCK_N))](
        *(x_TN, *first[:3], hidden if biases is None else biases[0], ids_Tk, weights_Tk),
        *(x_TN if logits_TE is None else logits_TE, hidden, features, pair.between, pair.count),
        *(float(shape.limit), float(shape.alpha), 0 if logits_TE is None else logits_TE.stride(0), x_TN.stride(0)),
        *first[3:],
        CHOICES=choices,
        GATED=shape.gated,
        KIND=shape.kind,
        WEIGHED=1 if shape.scale_input else 0,
        BIASED=biases is not None,
        ROUTE=logits_TE is not None,
        RENORMALISE=renormalise,
        BLOCK_E=1 if logits_TE is None else max(16, power_of_2(logits_TE.shape[1])),
        **_widths(pair.first),
        **launch,
    )
    _few_down_any[(tokens, ceil_div(features, BLOCK_N))](
        *(hidden, *second[:3], hidden if biases is None else biases[1], ids_Tk, weights_Tk, out_TN),
        *(pair.between, features, pair.count, *second[3:]),
        CHOICES=choices,
        WEIGHED=0 if shape.scale_input else 2,
        BIASED=biases is not None,
        **_widths(pair.second),
        **launch,
    )
    return out_TN
