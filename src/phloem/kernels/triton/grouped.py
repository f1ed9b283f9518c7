"""Grouped products of experts that are no plain gated MLPs of whole numbers: with biases, without a gate, of other
activations, whose weights scale their input, or of weights of 4 bits, which are widened in registers (`nibbles.py`).

The order of work is that of `moe.py`, and so are its legend and its rules: nothing is decided on the host, and the same
input gives the same bits. A tile here is turned: rows of the weight by rows of x. So the tensor cores take the weight
from registers where it was widened, and tiles of few rows of x need not be filled up. Up to `FEW_TOKENS` tokens
`grouped_few.py` does all.
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton._base import activate, ceil_div, stages
from phloem.kernels.triton._device import capability
from phloem.kernels.triton.activation import GELU_TANH, SILU
from phloem.kernels.triton.early import await_previous, early
from phloem.kernels.triton.nibbles import Stack, scales_at, warp_groups, widened_halves

SWIGLU_CLAMP, RELU2 = 2, 3
KINDS = {"silu": SILU, "gelu_tanh": GELU_TANH, "swiglu_clamp": SWIGLU_CLAMP, "relu2": RELU2}
WHOLE, READ, GIVEN = 0, 1, 2  # a pair's weight takes no part, multiplies what is read, or what is given


@dataclass(frozen=True, slots=True)
class Shape:
    """What each expert computes: activation number, with a gate or without, the constants of a clamped one."""

    kind: int = SILU
    gated: bool = True
    limit: float = 0.0
    alpha: float = 0.0
    scale_input: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Both products of all experts: the first one's rows are an expert's gates, then its ups."""

    first: Stack
    second: Stack
    count: int
    biases: tuple[Tensor, Tensor] | None = None  # one number for each row of both stacks
    shape: Shape = Shape()

    @property
    def between(self) -> int:
        """Features between the products."""
        return self.first.values.shape[0] // self.count // (2 if self.shape.gated else 1)


@triton.jit
def activated(gate, up, limit, alpha, KIND: tl.constexpr, GATED: tl.constexpr):
    """`reference_models.activate`; without a gate `up` is not looked at. What is no number stays so."""
    if KIND == 2:
        every: tl.constexpr = tl.PropagateNan.ALL
        gate = tl.minimum(gate, limit, propagate_nan=every)
        up = tl.minimum(tl.maximum(up, -limit, propagate_nan=every), limit, propagate_nan=every)
        return (up + 1.0) * (gate * tl.sigmoid(gate * alpha))
    else:
        if KIND == 3:
            some = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
            value = some * some
        else:
            value = activate(gate, KIND)
        if GATED:
            value = value * up
        return value


@triton.jit(do_not_specialize=["pairs"])
def _grouped_any(
    x,
    weight,
    scale,
    zero,
    bias,
    out,
    order,
    tile_expert,
    routing,
    pairs,
    features_in,
    features_out,
    limit,
    alpha,
    stride_x,
    stride_w,
    stride_se,
    stride_sg,
    stride_out,
    CHOICES: tl.constexpr,
    FIRST: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHED: tl.constexpr,
    BIASED: tl.constexpr,
    WIDTH: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of pairs, blocks of output features). x's row is pair // CHOICES; out's row is the pair.

    FIRST: the first product, activated; GATED: an expert's rows are first all gates, then all ups.
    WEIGHED 1: `routing` multiplies what is read, 2: what is given, bias included.
    """
    await_previous(PDL)
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(order + tl.program_id(0) * TILE + tl.arange(0, TILE))
    valid = pair < pairs
    at_x = x + (pair // CHOICES).to(tl.int64)[None, :] * stride_x
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = col < features_out
    row = expert * features_out * (2 if GATED else 1) + col
    acc = tl.zeros([BLOCK_N, TILE], tl.float32)
    second = tl.zeros([BLOCK_N, TILE], tl.float32)
    if WIDTH == 0:
        k = tl.arange(0, BLOCK_K)
        at_w = weight + row[:, None] * stride_w + k[None, :]
        at_up = at_w + features_out.to(tl.int64) * stride_w
        for start in range(0, features_in, BLOCK_K):
            some = start + k < features_in
            a = tl.load(at_x + start + k[:, None], mask=some[:, None] & valid[None, :], other=0.0)
            b = tl.load(at_w + start, mask=inside[:, None] & some[None, :], other=0.0)
            acc = tl.dot(b, a, acc, input_precision="ieee")
            if GATED:
                c = tl.load(at_up + start, mask=inside[:, None] & some[None, :], other=0.0)
                second = tl.dot(c, a, second, input_precision="ieee")
    else:
        HALF: tl.constexpr = GROUP // 2
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        group, within = tl.arange(0, GROUPS), tl.arange(0, HALF)
        place = tl.arange(0, BLOCK_K // 2)
        k = place // HALF * GROUP + place % HALF
        at_w = weight + row[:, None, None] * stride_w + (group[None, :, None] * HALF + within[None, None, :])
        to_s = expert * stride_se + col
        more_w = features_out.to(tl.int64) * stride_w
        TYPE: tl.constexpr = x.dtype.element_ty
        for start in range(0, features_in, BLOCK_K):
            # Asked for first, while the tensor cores still have the last turn's: most are too small to be copied in the
            # background.
            step, origin = scales_at(
                scale + to_s, zero + to_s, start, features_in, inside, group, stride_sg, ZEROS, GROUP
            )
            if GATED:
                up_s = to_s + features_out
                up_step, up_origin = scales_at(
                    scale + up_s, zero + up_s, start, features_in, inside, group, stride_sg, ZEROS, GROUP
                )
            some = (start + k < features_in)[:, None] & valid[None, :]
            low = tl.load(at_x + start + k[:, None], mask=some, other=0.0)
            high = tl.load(at_x + start + HALF + k[:, None], mask=some, other=0.0)
            whole = inside[:, None] & (start + group * GROUP < features_in)[None, :]
            there = tl.broadcast_to(whole[:, :, None], [BLOCK_N, GROUPS, HALF])
            both = tl.load(at_w + start // 2, mask=there, other=0)
            b, c = widened_halves(both, step, origin, WIDTH, ZEROS, BLOCK_N, GROUPS, HALF, TYPE)
            acc = tl.dot(b, low, acc, input_precision="ieee")
            acc = tl.dot(c, high, acc, input_precision="ieee")
            if GATED:
                both = tl.load(at_w + more_w + start // 2, mask=there, other=0)
                b, c = widened_halves(both, up_step, up_origin, WIDTH, ZEROS, BLOCK_N, GROUPS, HALF, TYPE)
                second = tl.dot(b, low, second, input_precision="ieee")
                second = tl.dot(c, high, second, input_precision="ieee")
    if WEIGHED == 1:
        weigh = tl.load(routing + pair, mask=valid, other=0.0)[None, :]
        acc *= weigh
        second *= weigh
    if BIASED:
        acc += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            second += tl.load(bias + row + features_out, mask=inside, other=0.0).to(tl.float32)[:, None]
    if FIRST:
        acc = activated(acc, second, limit, alpha, KIND, GATED)
    if WEIGHED == 2:
        acc *= tl.load(routing + pair, mask=valid, other=0.0)[None, :]
    # The last axis of `out` is the features: neighbours of a row are stored together.
    done = tl.trans(acc.to(out.dtype.element_ty))
    at_out = out + pair.to(tl.int64)[:, None] * stride_out + col[None, :]
    tl.store(at_out, done, mask=valid[:, None] & inside[None, :])


def _blocks(stack: Stack, tile: int, wide: bool, gated: bool) -> tuple[int, int, int]:
    """(Rows of the weight in a tile, features of a turn, warps)."""
    if wide:
        return 32, max(32, stack.group), 4
    if stack.scale is None:
        block_n = 64 if gated or tile < 64 else 128
        return block_n, 64 if tile >= 64 else 128, 8 if tile >= 128 else 4
    if not warp_groups(stack.values.device):
        return (64, max(64, stack.group), 8) if tile >= 64 else (64, 128, 4)
    if gated and tile >= 128 and capability(stack.values.device) >= 100:
        # Of two products with two halves each, those of 128 rows are more than the memory of Blackwell's tensor cores
        # holds: Triton 3.6 says nothing, and gives a kernel that does nothing.
        return 64, 128, 8
    # A warp group's rows are its own, so that what it widens goes from registers to the tensor cores.
    return (128, 128, 8) if tile >= 64 else (64, 128, 4)


def _multiply(
    x: Tensor, pair: Pair, out: Tensor, lists: tuple[Tensor, Tensor], tile: int, routing: Tensor, *, first: bool
) -> None:
    """One product; x has the rows of tokens for the first, and of pairs for the second."""
    order, tile_expert = lists
    stack, shape = (pair.first, pair.shape) if first else (pair.second, Shape(gated=False))
    features_out, choices = out.shape[1], out.shape[0] // x.shape[0]
    block_n, block_k, warps = _blocks(stack, tile, x.dtype == torch.float32, shape.gated)
    values, scale, zero, *strides = stack.arguments()
    weighed = GIVEN if not first else READ
    if pair.shape.scale_input != first:
        weighed = WHOLE
    bias = out if pair.biases is None else pair.biases[0 if first else 1]
    _grouped_any[(tile_expert.shape[0], ceil_div(features_out, block_n))](
        *(x, values, scale, zero, bias, out, order, tile_expert, routing),
        *(out.shape[0], x.shape[1], features_out, float(shape.limit), float(shape.alpha)),
        *(x.stride(0), *strides, out.stride(0)),
        CHOICES=choices,
        FIRST=first,
        GATED=shape.gated,
        KIND=shape.kind,
        WEIGHED=weighed,
        BIASED=pair.biases is not None,
        WIDTH=stack.width,
        ZEROS=stack.zero is not None,
        GROUP=stack.group,
        TILE=tile,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages(3),
        **early(out),
    )


def parts_of_any(x_TN: Tensor, weights_Tk: Tensor, pair: Pair, lists: tuple[Tensor, Tensor], tile: int) -> Tensor:
    """What each pair's expert makes of its token, times the pair's weight, [T * k, N], by programs of one tile each."""
    hidden = torch.empty((weights_Tk.numel(), pair.between), dtype=x_TN.dtype, device=x_TN.device)
    parts = torch.empty((weights_Tk.numel(), x_TN.shape[1]), dtype=x_TN.dtype, device=x_TN.device)
    _multiply(x_TN, pair, hidden, lists, tile, weights_Tk, first=True)
    _multiply(hidden, pair, parts, lists, tile, weights_Tk, first=False)
    return parts
