"""Grouped GEMMs of many rows: as many programs as fit the device at once walk the tiles of all experts, and tensor
descriptors (TMA) bring the tiles of the weights.

The first product leaves its result in the order of the sorted pairs, padded to whole tiles, so that the second reads
rows that lie together: by a descriptor too. Tiles are walked some rows of tiles at a time and through all features
before the next, so that programs that run side by side share rows and weights in the cache. Descriptors are made on the
host: they are arguments of the launch, a recorded step keeps them, and no memory is asked for on the device.

Which devices have this, and whether it is used, is decided in `trial.py`. Legend as in `moe.py`.
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from phloem.kernels.triton._base import activate, power_of_2
from phloem.kernels.triton._device import multiprocessors
from phloem.kernels.triton.early import await_previous, early

GROUP_K = 128  # features that share one scale in block-scaled float8
TILE = 128  # rows of a tile
COPIED = 8  # rows that a program copies
WALK = 8  # tiles of rows that are walked together
ALIGNED = 16  # bytes: of a descriptor's address and strides
UNSCALED, BLOCKS, ROWS = 0, 1, 2
Quantise = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _walk_grouped(
    x,
    weight,
    out,
    order,
    tile_expert,
    routing,
    x_scale,
    weight_scale,
    pairs,
    tiles,
    features_in,
    features_out,
    expert_rows,
    stride_x,
    stride_out,
    stride_xs,
    stride_wse,
    stride_wsm,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    SORTED: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    WALK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCAN: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (programs). `weight` describes [E * rows of an expert, features_in].

    GATED (the first product): x's row is pair // CHOICES, out's the place in `order`, and the weight's rows are first
    all gates, then all ups. Otherwise x's row is the place, out's the pair, and the result is weighted by `routing`.
    SORTED: x is a descriptor, and its row always the place. SCALED 1: scales per row and group of features, and per
    block of the weight; 2: per row, and per row of the weight. FLAT: the loops over tiles and features are made one.
    """
    await_previous(PDL)
    used = 0
    for start in range(0, tiles, SCAN):
        at = start + tl.arange(0, SCAN)
        used += tl.sum((tl.load(tile_expert + at, mask=at < tiles, other=-1) >= 0).to(tl.int32), axis=0)
    blocks = tl.cdiv(features_out, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for work in tl.range(tl.program_id(0), used * blocks, tl.num_programs(0), flatten=FLAT):
        first = work // (WALK * blocks) * WALK
        beside = tl.minimum(used - first, WALK)
        within = work % (WALK * blocks)
        tile = first + within % beside
        begin = within // beside * BLOCK_N
        expert = tl.load(tile_expert + tile)
        place = tile * TILE + tl.arange(0, TILE)
        pair = tl.load(order + place)
        valid = pair < pairs
        row = (place if SORTED else pair // CHOICES).to(tl.int64)
        col = begin + tl.arange(0, BLOCK_N)
        inside = col < features_out
        at_w = expert * expert_rows + begin
        at_scale = weight_scale + expert.to(tl.int64) * stride_wse
        if not SORTED:
            at_x = x + row[:, None] * stride_x + k[None, :]
        acc = tl.zeros([TILE, BLOCK_N], tl.float32)
        second = tl.zeros([TILE, BLOCK_N], tl.float32)
        for start in range(0, features_in, BLOCK_K):
            if SORTED:
                a = x.load([tile * TILE, start])
            else:
                some = start + k < features_in
                a = tl.load(at_x + start, mask=valid[:, None] & some[None, :], other=0.0)
            b = weight.load([at_w, start])
            if SCALED == 1:
                group = start // GROUP
                row_scale = tl.load(x_scale + row * stride_xs + group, mask=valid, other=0.0)
                # A block of features lies in one group of the weight's rows.
                scale = tl.load(at_scale + begin // GROUP * stride_wsm + group)
                acc += tl.dot(a, b.T) * (row_scale * scale)[:, None]
            else:
                acc = tl.dot(a, b.T, acc, input_precision="ieee")
            if GATED:
                c = weight.load([at_w + features_out, start])
                if SCALED == 1:
                    scale = tl.load(at_scale + (begin + features_out) // GROUP * stride_wsm + group)
                    second += tl.dot(a, c.T) * (row_scale * scale)[:, None]
                else:
                    second = tl.dot(a, c.T, second, input_precision="ieee")
        if SCALED == 2:
            row_scale = tl.load(x_scale + row, mask=valid, other=0.0)[:, None]
            acc *= row_scale * tl.load(at_scale + col * stride_wsm, mask=inside, other=0.0)[None, :]
            if GATED:
                at_up = at_scale + (col + features_out) * stride_wsm
                second *= row_scale * tl.load(at_up, mask=inside, other=0.0)[None, :]
        if GATED:
            acc = activate(acc, KIND) * second
            to = place.to(tl.int64)
            keep = inside[None, :]
        else:
            acc *= tl.load(routing + pair, mask=valid, other=0.0)[:, None]
            to = pair.to(tl.int64)
            keep = valid[:, None] & inside[None, :]
        tl.store(out + to[:, None] * stride_out + col[None, :], acc.to(out.dtype.element_ty), mask=keep)


@dataclass(frozen=True, slots=True)
class Form:
    """One way to cut the products. Features of a tile: of gate and of up each, and of the second product."""

    name: str
    gated: int
    plain: int
    warps: int
    stages: int
    programs: int  # per multiprocessor
    copied: bool  # the rows of the first product are copied into order before; else they are gathered as they are read
    flat: bool  # a program begins to read its next tile before it has written the last


FORMS = (
    Form("128 x 256", 128, 256, 8, 3, 1, False, False),
    Form("128 x 128, two programs", 64, 128, 4, 3, 2, False, False),
    Form("128 x 256, rows copied", 128, 128, 8, 4, 1, True, True),
)
FORMS_FLOAT8 = (
    Form("128 x 128", 64, 128, 8, 4, 1, False, False),
    Form("128 x 128, rows copied", 64, 128, 8, 4, 1, True, True),
)


@triton.jit(do_not_specialize=["pairs"])
def _gather_rows(
    x,
    scale,
    out,
    out_scale,
    order,
    tile_expert,
    pairs,
    features,
    groups,
    stride_x,
    CHOICES: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (places / ROWS): rows of pairs, and their scales, in the order of the pairs; zeros where there is none."""
    await_previous(PDL)
    if tl.load(tile_expert + tl.program_id(0) * ROWS // TILE) < 0:
        return
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    pair = tl.load(order + place)
    valid = (pair < pairs)[:, None]
    row = (pair // CHOICES).to(tl.int64)
    for start in range(0, features, BLOCK):
        col = start + tl.arange(0, BLOCK)
        keep = (col < features)[None, :]
        value = tl.load(x + row[:, None] * stride_x + col[None, :], mask=valid & keep, other=0.0)
        tl.store(out + place[:, None] * features + col[None, :], value, mask=keep)
    if SCALED:
        group = tl.arange(0, BLOCK_G)
        keep = (group < groups)[None, :]
        step = tl.load(scale + row[:, None] * groups + group[None, :], mask=valid & keep, other=0.0)
        tl.store(out_scale + place[:, None] * groups + group[None, :], step, mask=keep)


def _copied(
    x_TN: Tensor, scale: Tensor | None, lists: tuple[Tensor, Tensor], pairs: int, choices: int
) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens for each pair, in the order of the pairs, and their scales."""
    order, tile_expert = lists
    places, features = order.shape[0], x_TN.shape[1]
    out = torch.empty((places, features), dtype=x_TN.dtype, device=x_TN.device)
    out_scale = None if scale is None else scale.new_empty((places, *scale.shape[1:]))
    groups = 0 if scale is None else scale[0].numel()
    _gather_rows[(places // COPIED,)](
        *(x_TN, x_TN if scale is None else scale, out, out if out_scale is None else out_scale, order, tile_expert),
        *(pairs, features, groups, x_TN.stride(0)),
        CHOICES=choices,
        SCALED=scale is not None,
        TILE=TILE,
        ROWS=COPIED,
        BLOCK=512,
        BLOCK_G=power_of_2(groups),
        **early(out),
    )
    return out, out_scale


def unfit(gate_up_EMN: Tensor, down_ENF: Tensor, scales: tuple[Tensor, Tensor] | None) -> str:
    """Why descriptors do not reach these weights, or scales do not fall as the kernel reads them; "": they do."""
    for weight in (gate_up_EMN, down_ENF):
        rows, size = weight.shape[1], weight.element_size()
        if weight.stride(0) != rows * weight.stride(1) or weight.stride(2) != 1:
            return "experts do not lie one behind the other"
        if weight.stride(1) * size % ALIGNED or weight.data_ptr() % ALIGNED:
            return f"rows of {weight.shape[2]} features do not begin at multiples of {ALIGNED} bytes"
        if weight.shape[0] * rows >= 2**31:
            return "too many rows"
    if scales is not None and scales[0].dim() == 3 and down_ENF.shape[2] % GROUP_K:
        return f"{down_ENF.shape[2]} features between the products are no multiple of {GROUP_K}"
    return ""


def _multiply(
    x: Tensor,
    weight_EMN: Tensor,
    out: Tensor,
    lists: tuple[Tensor, Tensor],
    form: Form,
    pairs: int,
    choices: int,
    routing: Tensor | None,
    kind: int,
    scales: tuple[Tensor, Tensor] | None,
) -> None:
    """One product; `routing` is None for the first, which is gated, and whose x may have the rows of tokens."""
    order, tile_expert = lists
    count, rows, features_in = weight_EMN.shape
    gated = routing is None
    features_out = rows // 2 if gated else rows
    block_n = form.gated if gated else form.plain
    block_k = 128 // x.element_size()  # a descriptor's inner box has 128 bytes at most
    flat = weight_EMN.as_strided((count * rows, features_in), (weight_EMN.stride(1), 1))
    scaled = UNSCALED if scales is None else (BLOCKS if scales[1].dim() == 3 else ROWS)
    x_scale, weight_scale = scales if scales is not None else (out, out)
    of_expert, of_row = weight_scale.stride()[:2] if scales is not None else (0, 0)
    in_order = form.copied or not gated
    reads = TensorDescriptor.from_tensor(x, [TILE, block_k]) if in_order else x
    _walk_grouped[(form.programs * multiprocessors(out),)](
        *(reads, TensorDescriptor.from_tensor(flat, [block_n, block_k]), out, order, tile_expert),
        *(out if routing is None else routing, x_scale, weight_scale),
        *(pairs, tile_expert.shape[0], features_in, features_out, rows),
        *(x.stride(0), out.stride(0), x_scale.stride(0) if scales is not None else 0, of_expert, of_row),
        CHOICES=choices,
        GATED=gated,
        KIND=kind,
        SORTED=in_order,
        SCALED=scaled,
        GROUP=GROUP_K,
        TILE=TILE,
        WALK=WALK,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SCAN=256,
        FLAT=form.flat,
        num_warps=form.warps,
        num_stages=form.stages,
        **early(out),
    )


def parts_of_many(
    x_TN: Tensor,
    weights_Tk: Tensor,
    gate_up_EMN: Tensor,
    down_ENF: Tensor,
    kind: int,
    scales: tuple[Tensor, Tensor] | None,
    lists: tuple[Tensor, Tensor],
    form: Form,
    quantise: Quantise,
) -> Tensor:
    """weight * down(activation(gate(x)) * up(x)) of each pair, [T * k, N]; `lists` are those for tiles of `TILE`.

    `quantise`: of rows in float8 weights' type, with their scales, as the weights' scales ask for.
    """
    tokens, choices = weights_Tk.shape
    pairs, device, between = tokens * choices, x_TN.device, down_ENF.shape[2]
    parts = torch.empty((pairs, x_TN.shape[1]), dtype=x_TN.dtype, device=device)
    x, x_scale, first, second = x_TN, None, None, None
    if scales is not None:
        x, x_scale = quantise(x_TN, gate_up_EMN.dtype)
    if form.copied:
        x, x_scale = _copied(x, x_scale, lists, pairs, choices)
    if scales is not None and x_scale is not None:
        first = x_scale, scales[0]
    hidden = torch.empty((lists[0].shape[0], between), dtype=x_TN.dtype, device=device)
    _multiply(x, gate_up_EMN, hidden, lists, form, pairs, choices, None, kind, first)
    if scales is not None:
        hidden, hidden_scale = quantise(hidden, down_ENF.dtype)
        second = hidden_scale, scales[1]
    _multiply(hidden, down_ENF, parts, lists, form, pairs, 1, weights_Tk, kind, second)
    return parts
