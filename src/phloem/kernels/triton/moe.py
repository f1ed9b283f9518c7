"""Mixture of experts: routing, sorting tokens by expert, and the grouped GEMMs with their activation fused.

Order of work: `route` picks k experts per token; `sort_by_expert` lists the (token, choice) pairs expert by expert,
each expert's list padded to whole tiles (one launch does both for up to `route.SORTED_TOKENS` tokens); the first
grouped GEMM computes gate and up of a tile and writes activation(gate) * up, in float8 with its scale where the second
GEMM reads that; the second multiplies by the routing weight; `sum_choices` adds a token's k results in order. Where
an expert gets many rows, `many.py` does both products in another way, if a trial finds that better (`trial.py`). Up to
`FEW_TOKENS` tokens nothing is sorted and no tile is filled: each pair reads its expert's rows, and the sum over the
choices is inside the second product. There the first product routes, so that two launches do all; float8 weights meet
unquantised activations.
Nothing is decided on the host, and no atomics: the same input gives the same bits. Legend: E experts, k choices,
N features, F features between the two GEMMs.
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.specs import ExpertSpec
from phloem.kernels.triton import experts as odd
from phloem.kernels.triton import many, trial
from phloem.kernels.triton._base import activate, ceil_div, fp8_limit, power_of_2, stages
from phloem.kernels.triton.activation import GELU_TANH, SILU
from phloem.kernels.triton.choices import sum_choices
from phloem.kernels.triton.early import await_previous, early
from phloem.kernels.triton.many import BLOCKS, ROWS, UNSCALED
from phloem.kernels.triton.quantise import per_group_fp8, per_token_fp8
from phloem.kernels.triton.route import (
    CHOSEN_EXPERTS,
    FEW_TOKENS,
    choose,
    route,
    route_and_sort,
    sort_by_expert,
    tile_size,
)
from phloem.kernels.triton.weights import Float8Blocks, Float8Rows, Form, widened

GROUP_K = 128  # features that share one scale in block-scaled float8
KINDS = {"silu": SILU, "gelu_tanh": GELU_TANH}


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
    out_scale,
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
    LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of pairs, blocks of output features). x's row is pair // CHOICES; out's row is the pair.

    GATED: the weight's rows are first all gates, then all ups, and what is written is activation(gate) * up.
    SCALED 1: scales per row and group of features, and per block of the weight; 2: per row, and per row of the weight.
    LIMIT above 0: in float8 that ends there, with a scale per pair and block of features, which is then a group.
    """
    await_previous(PDL)
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
        if SCALED == 1:
            group = start // GROUP
            row_scale = tl.load(x_scale + source * stride_xs + group, mask=valid, other=0.0)
            col_scale = tl.load(at_scale + (col // GROUP) * stride_wsm + group, mask=inside, other=0.0)
            acc += tl.dot(a, b) * row_scale[:, None] * col_scale[None, :]
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        if GATED:
            c = tl.load(at_up + start, mask=some[:, None] & inside[None, :], other=0.0)
            if SCALED == 1:
                up_scale = tl.load(
                    at_scale + ((col + features_out) // GROUP) * stride_wsm + group, mask=inside, other=0.0
                )
                second += tl.dot(a, c) * row_scale[:, None] * up_scale[None, :]
            else:
                second = tl.dot(a, c, second, input_precision="ieee")
    if SCALED == 2:
        row_scale = tl.load(x_scale + source * stride_xs, mask=valid, other=0.0)[:, None]
        acc *= row_scale * tl.load(at_scale + col * stride_wsm, mask=inside, other=0.0)[None, :]
        if GATED:
            at_more = at_scale + (col + features_out) * stride_wsm
            second *= row_scale * tl.load(at_more, mask=inside, other=0.0)[None, :]
    if GATED:
        acc = activate(acc, KIND) * second
    if ROUTED:
        acc = acc * tl.load(routing + pair, mask=valid, other=0.0)[:, None]
    if LIMIT > 0:
        step = tl.maximum(tl.max(tl.where(inside[None, :], tl.abs(acc), 0.0), axis=1), 1e-10) / LIMIT
        groups = tl.num_programs(1)
        tl.store(out_scale + pair.to(tl.int64) * groups + tl.program_id(1), step, mask=valid)
        acc = tl.minimum(tl.maximum(acc / step[:, None], -LIMIT), LIMIT)
    at_out = out + pair.to(tl.int64)[:, None] * stride_out + col[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def _few_up(
    x,
    weight,
    scale,
    ids,
    routing,
    logits,
    out,
    features_in,
    features_out,
    experts,
    stride_logits,
    stride_x,
    stride_we,
    stride_wm,
    stride_se,
    stride_sm,
    CHOICES: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROUTE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    FOREIGN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (pairs, blocks of output features): activation(gate) * up of one pair. ROUTE: `ids` and `routing` are found
    here, by each program for itself, and written for the second product."""
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
    end = features_in
    if FOREIGN:
        there = (expert >= 0) & (expert < experts)
        expert = tl.where(there, expert, 0)
        end = tl.where(there, features_in, 0)
    first = tl.program_id(1) * BLOCK_N
    col = first + tl.arange(0, BLOCK_N)
    inside = col < features_out
    part = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    at_x = x + pair // CHOICES * stride_x + part
    at_gate = weight + expert * stride_we + col.to(tl.int64)[:, None, None] * stride_wm + part[None, :, :]
    at_up = at_gate + features_out.to(tl.int64) * stride_wm
    at_scale = scale + expert * stride_se + tl.arange(0, PARTS)[:, None]
    gate = tl.zeros([BLOCK_N, PARTS, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, PARTS, BLOCK_K], tl.float32)
    for start in range(0, end, PARTS * BLOCK_K):
        some = start + part < features_in
        keep = inside[:, None, None] & some[None, :, :]
        a = tl.load(at_x + start, mask=some, other=0.0).to(tl.float32)
        g = tl.load(at_gate + start, mask=keep, other=0.0).to(tl.float32)
        u = tl.load(at_up + start, mask=keep, other=0.0).to(tl.float32)
        if SCALED == 1:  # a part is a group, and the block of outputs lies in one of the weight's blocks
            group = start // GROUP
            there = (group + tl.arange(0, PARTS) < tl.cdiv(features_in, GROUP))[:, None]
            at_up_scale = at_scale + (first + features_out) // GROUP * stride_sm + group
            gate += g * (a * tl.load(at_scale + first // GROUP * stride_sm + group, mask=there, other=0.0))[None, :, :]
            up += u * (a * tl.load(at_up_scale, mask=there, other=0.0))[None, :, :]
        else:
            gate += g * a[None, :, :]
            up += u * a[None, :, :]
    of_gate, of_up = tl.sum(tl.sum(gate, axis=2), axis=1), tl.sum(tl.sum(up, axis=2), axis=1)
    if SCALED == 2:
        at_row = scale + expert * stride_se + col * stride_sm
        of_gate *= tl.load(at_row, mask=inside, other=0.0)
        of_up *= tl.load(at_row + features_out * stride_sm, mask=inside, other=0.0)
    result = activate(of_gate, KIND) * of_up
    tl.store(out + pair * features_out + col, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _few_down(
    x,
    weight,
    scale,
    ids,
    routing,
    out,
    features_in,
    features_out,
    experts,
    stride_we,
    stride_wm,
    stride_se,
    stride_sm,
    CHOICES: tl.constexpr,
    SCALED: tl.constexpr,
    FOREIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLACES: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens, blocks of output features): the weighted sum over a token's choices."""
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    col = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = col < features_out
    # All choices side by side, and PARTS parts of the features of each: that many loads are under way at once.
    place = tl.arange(0, PLACES * PARTS)
    part = place % PARTS * BLOCK_K
    mine = place // PARTS < CHOICES
    pair = token * CHOICES + place // PARTS
    expert = tl.load(ids + pair, mask=mine, other=0).to(tl.int64)
    weigh = tl.load(routing + pair, mask=mine, other=0.0)
    if FOREIGN:
        mine = mine & (expert >= 0) & (expert < experts)
        expert = tl.where(mine, expert, 0)
    at_x = x + (pair * features_in + part)[:, None] + k[None, :]
    at_w = weight + (expert * stride_we + part)[:, None, None] + k[None, None, :]
    at_w += col.to(tl.int64)[None, :, None] * stride_wm
    at_scale = scale + expert * stride_se
    acc = tl.zeros([PLACES * PARTS, BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, features_in, PARTS * BLOCK_K):
        some = mine[:, None] & ((start + part)[:, None] + k[None, :] < features_in)
        a = tl.load(at_x + start, mask=some, other=0.0).to(tl.float32)
        b = tl.load(at_w + start, mask=some[:, None, :] & inside[None, :, None], other=0.0).to(tl.float32)
        if SCALED == 1:
            at_group = at_scale + first // GROUP * stride_sm + (start + part) // GROUP
            a *= tl.load(at_group, mask=mine & (start + part < features_in), other=0.0)[:, None]
        acc += b * a[:, None, :]
    one = tl.sum(acc, axis=2)
    if SCALED == 2:
        at_row = at_scale[:, None] + (col * stride_sm)[None, :]
        one *= tl.load(at_row, mask=mine[:, None] & inside[None, :], other=0.0)
    total = tl.sum(tl.where(mine[:, None], one * weigh[:, None], 0.0), axis=0)
    tl.store(out + token * features_out + col, total.to(out.dtype.element_ty), mask=inside)


def _scaled(scales: tuple[Tensor, Tensor] | None) -> int:
    """How the second of these, of stacked weights, says that they are scaled."""
    return UNSCALED if scales is None else (BLOCKS if scales[1].dim() == 3 else ROWS)


def _few(
    x_TN: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up_EMN: Tensor,
    down_ENF: Tensor,
    kind: int,
    scales: tuple[Tensor, Tensor] | None,
    out_TN: Tensor,
    logits_TE: Tensor | None = None,
    renormalise: bool = False,
    foreign: bool = False,
) -> Tensor:
    """`experts` of a few tokens: every pair reads its expert's rows for itself. With `logits_TE` weights and ids are
    not known yet, and become what `route` finds."""
    tokens, features = x_TN.shape
    between, choices = down_ENF.shape[2], ids_Tk.shape[1]
    hidden = torch.empty((tokens * choices, between), dtype=x_TN.dtype, device=x_TN.device)
    first, second = scales if scales is not None else (hidden, hidden)
    steps = (first.stride()[:2], second.stride()[:2]) if scales is not None else ((0, 0), (0, 0))
    # What a program loads in a turn keeps enough bytes under way for the device's memory: scripts/triton_code.py.
    narrow, up_n = scales is not None, math.gcd(16, between)  # gates and ups of a program each lie in one block
    shape = {"SCALED": _scaled(scales), "FOREIGN": foreign, "GROUP": GROUP_K, "BLOCK_K": GROUP_K if narrow else 256}
    _few_up[(tokens * choices, ceil_div(between, up_n))](
        *(x_TN, gate_up_EMN, first, ids_Tk, weights_Tk, x_TN if logits_TE is None else logits_TE, hidden),
        *(features, between, down_ENF.shape[0], 0 if logits_TE is None else logits_TE.stride(0), x_TN.stride(0)),
        *(*gate_up_EMN.stride()[:2], *steps[0]),
        CHOICES=choices,
        KIND=kind,
        ROUTE=logits_TE is not None,
        RENORMALISE=renormalise,
        BLOCK_E=1 if logits_TE is None else max(16, power_of_2(logits_TE.shape[1])),
        **shape,
        BLOCK_N=up_n,
        PARTS=2 if narrow else 1,
        num_warps=4,
        **early(x_TN),
    )
    _few_down[(tokens, ceil_div(features, 4))](
        *(hidden, down_ENF, second, ids_Tk, weights_Tk, out_TN, between, features, down_ENF.shape[0]),
        *(*down_ENF.stride()[:2], *steps[1]),
        CHOICES=choices,
        **shape,
        BLOCK_N=4,
        PLACES=power_of_2(choices),
        PARTS=2 if narrow else 1,
        num_warps=4,
        **early(x_TN),
    )
    return out_TN


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
    out_scale: Tensor | None = None,
) -> None:
    order, tile_expert = lists
    features_out = out.shape[1]
    wide = x.dtype == torch.float32
    block_n = 32 if wide or (gated and tile >= 128) else (128 if tile >= 64 and not gated else 64)
    if out_scale is not None:
        block_n = GROUP_K
    block_k = GROUP_K if scales is not None else (32 if wide else (64 if tile >= 64 else 128))
    x_scale, weight_scale = scales if scales is not None else (out, out)
    _grouped[(tile_expert.shape[0], ceil_div(features_out, block_n))](
        *(x, weight, out, order, tile_expert, out if routing is None else routing, x_scale, weight_scale),
        *(out if out_scale is None else out_scale, out.shape[0], x.shape[1], features_out),
        *(x.stride(0), *weight.stride()[:2], out.stride(0)),
        *((x_scale.stride(0), *weight_scale.stride()[:2]) if scales is not None else (0, 0, 0)),
        CHOICES=choices,
        GATED=gated,
        KIND=kind,
        ROUTED=routing is not None,
        SCALED=_scaled(scales),
        LIMIT=fp8_limit(out.dtype) if out_scale is not None else 0.0,
        GROUP=GROUP_K,
        TILE=tile,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if tile >= 128 or (out_scale is not None and tile >= 32) else 4,
        num_stages=stages(3),
        **early(out),
    )


def parts_of_tiles(
    x_TN: Tensor,
    weights_Tk: Tensor,
    gate_up_EMN: Tensor,
    down_ENF: Tensor,
    kind: int,
    scales: tuple[Tensor, Tensor] | None,
    lists: tuple[Tensor, Tensor],
    tile: int,
) -> Tensor:
    """weight * down(activation(gate(x)) * up(x)) of each pair, [T * k, N], by programs of one tile each."""
    choices, between = weights_Tk.shape[1], down_ENF.shape[2]
    pairs, device = weights_Tk.numel(), x_TN.device
    parts = torch.empty((pairs, x_TN.shape[1]), dtype=x_TN.dtype, device=device)
    if scales is None:
        hidden = torch.empty((pairs, between), dtype=x_TN.dtype, device=device)
        _gemm(x_TN, gate_up_EMN, hidden, lists, tile, None, choices, True, kind, None)
        _gemm(hidden, down_ENF, parts, lists, tile, weights_Tk, 1, False, kind, None)
        return parts
    blocks = _scaled(scales) == BLOCKS
    quantise = per_group_fp8 if blocks else per_token_fp8
    x8, x_scale = quantise(x_TN, gate_up_EMN.dtype)
    first = x_scale, scales[0]
    if blocks and tile < 128:
        # A program's block of features is a group of the next product's: it writes float8 and the scale.
        hidden8 = torch.empty((pairs, between), dtype=down_ENF.dtype, device=device)
        hidden_scale = torch.empty((pairs, ceil_div(between, GROUP_K)), dtype=torch.float32, device=device)
        _gemm(x8, gate_up_EMN, hidden8, lists, tile, None, choices, True, kind, first, hidden_scale)
    else:
        hidden = torch.empty((pairs, between), dtype=x_TN.dtype, device=device)
        _gemm(x8, gate_up_EMN, hidden, lists, tile, None, choices, True, kind, first)
        hidden8, hidden_scale = quantise(hidden, down_ENF.dtype)
    _gemm(hidden8, down_ENF, parts, lists, tile, weights_Tk, 1, False, kind, (hidden_scale, scales[1]))
    return parts


def _of_rows(scales: tuple[Tensor, Tensor], rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scales of whole matrices, [E], as those of each of their rows."""
    first, second = (s[:, None].expand(-1, n) if s.dim() == 1 else s for s, n in zip(scales, rows, strict=True))
    return first, second


def experts(
    x_TN: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up_EMN: Tensor,
    down_ENF: Tensor,
    kind: int = SILU,
    scales: tuple[Tensor, Tensor] | None = None,
    lists: tuple[Tensor, Tensor] | None = None,
    foreign: bool = False,
) -> Tensor:
    """Sum over a token's choices of weight * down(activation(gate(x)) * up(x)) -> [T, N].

    gate_up [E, 2F, N] (gates, then ups), down [E, N, F]. With `scales` the weights are float8 with float32 scales:
    per 128 x 128 block, [E, 2F / 128, N / 128] and [E, N / 128, F / 128], and activations are then quantised per token
    and 128; or per row, [E, 2F] and [E, N], or matrix, [E] and [E], and activations then per token.
    `lists`: what `sort_by_expert` gives for tiles of `tile_size`, if it is known. `foreign`: ids may be of no expert
    here, and add nothing then.
    """
    tokens = x_TN.shape[0]
    count, choices = down_ENF.shape[0], ids_Tk.shape[1]
    if tokens == 0:
        return torch.empty_like(x_TN)
    if scales is not None:
        scales = _of_rows(scales, (gate_up_EMN.shape[1], down_ENF.shape[1]))
    if tokens <= FEW_TOKENS:
        out_TN = torch.empty(x_TN.shape, dtype=x_TN.dtype, device=x_TN.device)
        return _few(x_TN, weights_Tk, ids_Tk, gate_up_EMN, down_ENF, kind, scales, out_TN, foreign=foreign)
    tile = tile_size(tokens * choices, count)
    lists = lists if lists is not None else sort_by_expert(ids_Tk, count, tile)
    work = trial.Work(gate_up_EMN, down_ENF, kind, scales, parts_of_tiles)
    form = trial.form_for(work, x_TN, weights_Tk, lists) if tile == many.TILE else None
    if form is None:
        parts = work.tiles(x_TN, weights_Tk, gate_up_EMN, down_ENF, kind, scales, lists, tile)
    else:
        parts = work.form(form, x_TN, weights_Tk, lists)
    return sum_choices(parts, ids_Tk, count, foreign=foreign)


Stacks = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]


def _stacks(gate_up: Tensor | Form, down: Tensor | Form, count: int) -> Stacks:
    """Matrices of each expert, and their scales, of stacks with one behind the other."""
    if isinstance(gate_up, Float8Rows | Float8Blocks) and type(gate_up) is type(down):
        pairs = [tuple(t.unflatten(0, (count, -1)) for t in form.tensors()) for form in (gate_up, down)]
        return pairs[0][0], pairs[1][0], (pairs[0][1], pairs[1][1])
    return widened(gate_up).unflatten(0, (count, -1)), widened(down).unflatten(0, (count, -1)), None


def moe(
    x_TN: Tensor, logits_TE: Tensor, gate_up: Tensor | Form, down: Tensor | Form, top_k: int, renormalise: bool
) -> Tensor:
    """The op table's entry: softmax routing over experts, stacked as gate_up [E * 2F, N] and down [E * N, F]."""
    tokens, count = logits_TE.shape
    if odd.four_bits(gate_up, down):
        return odd.routed(x_TN, logits_TE, odd.pair_of(gate_up, down, ExpertSpec(count)), top_k, renormalise)
    *stacks, scales = _stacks(gate_up, down, count)
    if 0 < tokens <= FEW_TOKENS and count <= CHOSEN_EXPERTS:
        weights_Tk = torch.empty((tokens, top_k), dtype=torch.float32, device=x_TN.device)
        ids_Tk = torch.empty((tokens, top_k), dtype=torch.int32, device=x_TN.device)
        out_TN = torch.empty(x_TN.shape, dtype=x_TN.dtype, device=x_TN.device)
        return _few(x_TN, weights_Tk, ids_Tk, *stacks, SILU, scales, out_TN, logits_TE, renormalise)
    if tokens <= FEW_TOKENS:
        return experts(x_TN, *route(logits_TE, top_k, renormalise), *stacks, scales=scales)
    tile = tile_size(tokens * top_k, count)
    weights_Tk, ids_Tk, lists = route_and_sort(logits_TE, top_k, renormalise, tile)
    return experts(x_TN, weights_Tk, ids_Tk, *stacks, scales=scales, lists=lists)


def chosen_experts(
    x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, gate_up: Tensor | Form, down: Tensor | Form
) -> Tensor:
    """The op table's entry: plain experts, stacked as for `moe`, chosen elsewhere; ids of none add nothing."""
    return _stacked(x_TN, ids_Tk, weights_Tk, gate_up, down, down.shape[0] // x_TN.shape[1], SILU)


def experts_op(
    x_TN: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up: Tensor | Form,
    down: Tensor | Form,
    spec: ExpertSpec,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The op table's entry for experts of any kind."""
    ids_Tk = ids_Tk - spec.first if spec.first else ids_Tk
    if biases is not None or not spec.gated or spec.scale_input or spec.activation not in KINDS:
        pair = odd.pair_of(gate_up, down, spec, biases)
        return odd.summed(x_TN, ids_Tk, weights_Tk, pair, gate_up.dtype)
    return _stacked(x_TN, ids_Tk, weights_Tk, gate_up, down, spec.experts, KINDS[spec.activation])


def _stacked(
    x_TN: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up: Tensor | Form,
    down: Tensor | Form,
    count: int,
    kind: int,
) -> Tensor:
    if odd.four_bits(gate_up, down):
        spec = ExpertSpec(count, "silu" if kind == SILU else "gelu_tanh")
        return odd.summed(x_TN, ids_Tk, weights_Tk, odd.pair_of(gate_up, down, spec), gate_up.dtype)
    *stacks, scales = _stacks(gate_up, down, count)
    weights_Tk, ids_Tk = weights_Tk.float().contiguous(), ids_Tk.to(torch.int32).contiguous()
    out_TN = experts(x_TN.to(gate_up.dtype), weights_Tk, ids_Tk, *stacks, kind, scales, foreign=True)
    return out_TN.to(x_TN.dtype)
