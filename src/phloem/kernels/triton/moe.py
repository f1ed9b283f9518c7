"""Mixture of experts: routing, sorting tokens by expert, and the grouped GEMMs with their activation fused.

Order of work: `route` picks k experts per token; `sort_by_expert` lists the (token, choice) pairs expert by expert,
each expert's list padded to whole tiles; the first grouped GEMM computes gate and up of a tile and writes
activation(gate) * up; the second multiplies by the routing weight; `_sum_choices` adds a token's k results in order.
Nothing is decided on the host, and no atomics: the same input gives the same bits. Legend: E experts, k choices,
N features, F features between the two GEMMs.
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

from phloem.kernels.triton._base import activate, ceil_div, power_of_2, stages
from phloem.kernels.triton.activation import SILU
from phloem.kernels.triton.quantise import per_group_fp8

GROUP_K = 128  # features that share one scale in block-scaled float8


@triton.jit
def _route(
    logits,
    bias,
    weights,
    ids,
    stride_logits,
    experts,
    scaling,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    keep = expert < experts
    x = tl.load(logits + token * stride_logits + expert, mask=keep, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score = tl.where(keep, tl.sigmoid(x), 0.0)
    else:
        score = tl.exp(x - tl.max(x, axis=0))
        score = score / tl.sum(score, axis=0)
    ranked = tl.where(keep, score, float("-inf"))
    if HAS_BIAS:
        # The bias decides who is chosen, not how much it counts (DeepSeek-V3's load balancing).
        ranked = tl.where(keep, score + tl.load(bias + expert, mask=keep, other=0.0), float("-inf"))
    choice = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    value = tl.zeros([BLOCK_K], tl.float32)
    for turn in range(TOP_K):
        high = tl.max(ranked, axis=0)
        place = tl.min(tl.where(ranked == high, expert, BLOCK - 1), axis=0)
        mine = tl.sum(tl.where(expert == place, score, 0.0), axis=0)
        chosen = tl.where(choice == turn, place, chosen)
        value = tl.where(choice == turn, mine, value)
        ranked = tl.where(expert == place, float("-inf"), ranked)
    if RENORMALISE:
        value = value / tl.sum(value, axis=0)
    at = token * TOP_K + choice
    tl.store(weights + at, value * scaling, mask=choice < TOP_K)
    tl.store(ids + at, chosen, mask=choice < TOP_K)


def route(
    logits_TE: Tensor,
    top_k: int,
    renormalise: bool,
    *,
    sigmoid: bool = False,
    bias_E: Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Router logits -> weights float32 [T, k] and expert ids int32 [T, k], best first, ties to the lower id."""
    tokens, experts = logits_TE.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits_TE.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits_TE.device)
    if tokens:
        _route[(tokens,)](
            logits_TE,
            bias_E if bias_E is not None else logits_TE,
            weights,
            ids,
            logits_TE.stride(0),
            experts,
            scaling,
            TOP_K=top_k,
            SIGMOID=sigmoid,
            RENORMALISE=renormalise,
            HAS_BIAS=bias_E is not None,
            BLOCK=power_of_2(experts),
            BLOCK_K=power_of_2(top_k),
            num_warps=1 if experts <= 128 else 4,
        )
    return weights, ids


@triton.jit(do_not_specialize=["pairs"])
def _count_expert(ids, counts, pairs, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    number = 0
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        number += tl.sum((tl.load(ids + at, mask=at < pairs, other=-1) == expert).to(tl.int32), axis=0)
    tl.store(counts + expert, number)


@triton.jit(do_not_specialize=["pairs"])
def _place_expert(
    ids, counts, order, tile_expert, pairs, experts, TILE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per expert writes its list into `order` (padding: `pairs`) and its name on its tiles."""
    expert = tl.program_id(0)
    other = tl.arange(0, BLOCK_E)
    number = tl.load(counts + other, mask=other < experts, other=0)
    tiles = (number + TILE - 1) // TILE
    begin = tl.sum(tl.where(other < expert, tiles, 0), axis=0)
    mine = tl.sum(tl.where(other == expert, tiles, 0), axis=0)
    placed = begin * TILE
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        hit = (tl.load(ids + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
        to = placed + tl.cumsum(hit, axis=0) - hit
        tl.store(order + to, at, mask=hit != 0)
        placed += tl.sum(hit, axis=0)
    end = (begin + mine) * TILE
    pad = tl.arange(0, TILE)
    tl.store(order + placed + pad, tl.full([TILE], 0, tl.int32) + pairs, mask=placed + pad < end)
    for tile in range(begin, begin + mine):
        tl.store(tile_expert + tile, expert)


def sort_by_expert(ids_Tk: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """(order, tile_expert): pair numbers (token * k + choice) by expert, padded to tiles with T * k; each tile's
    expert, -1 for a tile past the end. Sized for the worst case, so that shapes depend on T alone.
    """
    pairs = ids_Tk.numel()
    tiles = min(pairs, experts + pairs // tile) if pairs else 0
    device = ids_Tk.device
    counts = torch.empty(experts, dtype=torch.int32, device=device)
    order = torch.empty(max(tiles, 1) * tile, dtype=torch.int32, device=device)
    tile_expert = torch.full((max(tiles, 1),), -1, dtype=torch.int32, device=device)
    block = min(1024, power_of_2(pairs))
    _count_expert[(experts,)](ids_Tk, counts, pairs, BLOCK=block)
    _place_expert[(experts,)](
        ids_Tk, counts, order, tile_expert, pairs, experts, TILE=tile, BLOCK_E=power_of_2(experts), BLOCK=block
    )
    return order, tile_expert


@triton.jit(do_not_specialize=["pairs"])
def _grouped(
    x,
    weight,
    out,
    order,
    tile_expert,
    routing,
    x_scale,
    weight_scale,
    pairs,
    features_in,
    features_out,
    stride_x,
    stride_we,
    stride_wm,
    stride_out,
    stride_xs,
    stride_wse,
    stride_wsm,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    ROUTED: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (tiles of pairs, blocks of output features). x's row is pair // CHOICES; out's row is the pair.

    GATED: the weight's rows are first all gates, then all ups, and what is written is activation(gate) * up.
    """
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(order + tl.program_id(0) * TILE + tl.arange(0, TILE))
    valid = pair < pairs
    source = (pair // CHOICES).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = col < features_out
    k = tl.arange(0, BLOCK_K)
    at_x = x + source[:, None] * stride_x + k[None, :]
    at_w = weight + expert * stride_we + col.to(tl.int64)[None, :] * stride_wm + k[:, None]
    at_up = at_w + features_out.to(tl.int64) * stride_wm
    at_scale = weight_scale + expert * stride_wse
    acc = tl.zeros([TILE, BLOCK_N], tl.float32)
    second = tl.zeros([TILE, BLOCK_N], tl.float32)
    for start in range(0, features_in, BLOCK_K):
        some = start + k < features_in
        a = tl.load(at_x + start, mask=valid[:, None] & some[None, :], other=0.0)
        b = tl.load(at_w + start, mask=some[:, None] & inside[None, :], other=0.0)
        if SCALED:
            group = start // GROUP
            row_scale = tl.load(x_scale + source * stride_xs + group, mask=valid, other=0.0)
            col_scale = tl.load(at_scale + (col // GROUP) * stride_wsm + group, mask=inside, other=0.0)
            acc += tl.dot(a, b) * row_scale[:, None] * col_scale[None, :]
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        if GATED:
            c = tl.load(at_up + start, mask=some[:, None] & inside[None, :], other=0.0)
            if SCALED:
                up_scale = tl.load(
                    at_scale + ((col + features_out) // GROUP) * stride_wsm + group, mask=inside, other=0.0
                )
                second += tl.dot(a, c) * row_scale[:, None] * up_scale[None, :]
            else:
                second = tl.dot(a, c, second, input_precision="ieee")
    if GATED:
        acc = activate(acc, KIND) * second
    if ROUTED:
        acc = acc * tl.load(routing + pair, mask=valid, other=0.0)[:, None]
    at_out = out + pair.to(tl.int64)[:, None] * stride_out + col[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def _sum_choices(parts, out, features, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < features
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(CHOICES):
        total += tl.load(parts + (token * CHOICES + choice) * features + col, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + token * features + col, total.to(out.dtype.element_ty), mask=keep)


def _tile_size(pairs: int, experts: int) -> int:
    """Rows of a GEMM tile: about the pairs that an expert gets, between the tensor cores' least and 128."""
    return max(16, min(128, power_of_2(ceil_div(pairs, experts))))


def _gemm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    lists: tuple[Tensor, Tensor],
    tile: int,
    routing: Tensor | None,
    choices: int,
    gated: bool,
    kind: int,
    scales: tuple[Tensor, Tensor] | None,
) -> None:
    order, tile_expert = lists
    features_out = out.shape[1]
    wide = x.dtype == torch.float32
    block_n = 32 if wide or (gated and tile >= 128) else (128 if tile >= 64 and not gated else 64)
    block_k = GROUP_K if scales is not None else (32 if wide else (64 if tile >= 64 else 128))
    x_scale, weight_scale = scales if scales is not None else (out, out)
    _grouped[(tile_expert.shape[0], ceil_div(features_out, block_n))](
        x,
        weight,
        out,
        order,
        tile_expert,
        routing if routing is not None else out,
        x_scale,
        weight_scale,
        out.shape[0],
        x.shape[1],
        features_out,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        out.stride(0),
        x_scale.stride(0) if scales is not None else 0,
        weight_scale.stride(0) if scales is not None else 0,
        weight_scale.stride(1) if scales is not None else 0,
        CHOICES=choices,
        GATED=gated,
        KIND=kind,
        ROUTED=routing is not None,
        SCALED=scales is not None,
        GROUP=GROUP_K,
        TILE=tile,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if tile >= 128 else 4,
        num_stages=stages(3),
    )


def experts(
    x_TN: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up_EMN: Tensor,
    down_ENF: Tensor,
    kind: int = SILU,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sum over a token's choices of weight * down(activation(gate(x)) * up(x)) -> [T, N].

    gate_up [E, 2F, N] (gates, then ups), down [E, N, F]. With `scales` the weights are float8 with float32 scales per
    128 x 128 block, [E, 2F / 128, N / 128] and [E, N / 128, F / 128]; activations are then quantised per token and 128.
    """
    tokens, features = x_TN.shape
    count, between, choices = down_ENF.shape[0], down_ENF.shape[2], ids_Tk.shape[1]
    out = torch.empty((tokens, features), dtype=x_TN.dtype, device=x_TN.device)
    if tokens == 0:
        return out
    pairs = tokens * choices
    tile = _tile_size(pairs, count)
    lists = sort_by_expert(ids_Tk, count, tile)
    hidden = torch.empty((pairs, between), dtype=x_TN.dtype, device=x_TN.device)
    parts = torch.empty((pairs, features), dtype=x_TN.dtype, device=x_TN.device)
    if scales is None:
        _gemm(x_TN, gate_up_EMN, hidden, lists, tile, None, choices, True, kind, None)
        _gemm(hidden, down_ENF, parts, lists, tile, weights_Tk, 1, False, kind, None)
    else:
        x8, x_scale = per_group_fp8(x_TN, gate_up_EMN.dtype)
        _gemm(x8, gate_up_EMN, hidden, lists, tile, None, choices, True, kind, (x_scale, scales[0]))
        hidden8, hidden_scale = per_group_fp8(hidden, down_ENF.dtype)
        _gemm(hidden8, down_ENF, parts, lists, tile, weights_Tk, 1, False, kind, (hidden_scale, scales[1]))
    block = min(1024, power_of_2(features))
    _sum_choices[(tokens, ceil_div(features, block))](parts, out, features, CHOICES=choices, BLOCK=block)
    return out


def moe(x_TN: Tensor, logits_TE: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalise: bool) -> Tensor:
    """The op table's entry: softmax routing over dense experts, stacked as gate_up [E * 2F, N] and down [E * N, F]."""
    weights_Tk, ids_Tk = route(logits_TE, top_k, renormalise)
    count = logits_TE.shape[1]
    return experts(x_TN, weights_Tk, ids_Tk, gate_up.unflatten(0, (count, -1)), down.unflatten(0, (count, -1)))
