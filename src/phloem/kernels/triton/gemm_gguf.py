"""Products of integers of 4 to 8 bits in groups, the forms of GGUF files among them: widened in registers.

Groups are of 32 features, in two halves, each of which may have a scale of its own. Features lie in words so that a
program reads 16 bytes of a row and, for each bit that it looks at, features of x that are neighbours:

    codes   int32, of 4 to 6 bits [M, N / 8]: four bits of a group's feature 4 n + w are bits 4 n of its word w of four,
            of 8 bits [M, N / 4]: all bits of a half's feature 4 n + w are bits 8 n of its word w of four
    high    [M, G * 4]: what a group's features 4 n + w have above those four bits: of 5 bits bit n of uint8 number w of
            four, of 6 bits the bits 2 n and 2 n + 1 of int16 number w; otherwise None
    scale   [M, S], each for as many halves; floats, or bytes to be multiplied with `outer`
    least   as the scale; or zero points, which are in codes, and floats; None: 0
    outer   float16 [1 or 2, M, G / 8]: factors of the scales, and of what is least, for 256 features each

A feature is (code - offset) * scale - least, or (code - zero point) * scale. In registers codes become the upper bits
of a mantissa, 1 + code / 2 ** bits, because conversions of integers are slow. One or two tokens are multiplied in
float32, without tensor cores: their products wait for the weights. Fewer than `MANY` read weights that are rounded to
the activations' type in registers; more read a copy of some rows at a time, which the vendor's product takes.
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from phloem.kernels.triton._base import ceil_div, power_of_2, split_target, stages, sum_splits
from phloem.kernels.triton._device import multiprocessors
from phloem.kernels.triton.early import await_previous, early

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUP = 32
FEW = 2  # tokens that are multiplied without tensor cores
MANY = 256  # tokens from which on a copy of the weights costs less than widening them anew for each tile of tokens
_COPIED = 1 << 25  # weights of one copy
_ROWS = 4  # of a program that widens rows


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Rows of a matrix that are stored alike, one behind the other. `bits`: 4, 5, 6 or 8."""

    bits: int
    codes: Tensor
    scale: Tensor
    high: Tensor | None = None
    least: Tensor | None = None
    outer: Tensor | None = None
    offset: int = 0
    zeros: bool = False  # what is least are zero points

    @property
    def features(self) -> int:
        return self.codes.shape[1] * (4 if self.bits == 8 else 8)

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that it has."""
        return tuple(t for t in (self.codes, self.scale, self.high, self.least, self.outer) if t is not None)


def _arguments(run: Run) -> tuple[Any, ...]:
    """What each kernel is given of a run: five tensors, then their strides."""
    least = run.scale if run.least is None else run.least
    high = run.codes if run.high is None else run.high
    outer = run.scale if run.outer is None else run.outer
    over = (0, 0) if run.outer is None else run.outer.stride()[:2]
    strides = run.codes.stride(0), run.scale.stride(0), high.stride(0), *over
    return (run.codes, high, run.scale, least, outer, *strides)


def _constants(run: Run) -> dict[str, Any]:
    return {
        "BITS": run.bits,
        "OFFSET": run.offset,
        "HALVES": run.features // 16 // run.scale.shape[1],
        "LEAST": 0 if run.least is None else 2 if run.zeros else 1,
        "OUTER": run.outer is not None,
    }


@triton.jit
def _word(codes, row, group, keep, stride_c, HALF: tl.constexpr, BITS: tl.constexpr):
    """int32 [M, G, 4]: the words that have a half of groups."""
    w = tl.arange(0, 4)[None, None, :]
    step: tl.constexpr = 8 if BITS == 8 else 4
    skip: tl.constexpr = 4 * HALF if BITS == 8 else 0
    at = codes + row[:, None, None] * stride_c + (group[None, :, None] * step + skip + w)
    return tl.load(at, mask=keep[:, :, None], other=0)


@triton.jit
def _above(high, row, group, keep, stride_h, BITS: tl.constexpr):
    """int32 [M, G, 4]: what has the bits above the fourth; any number where there are none."""
    found = tl.arange(0, 4)[None, None, :]
    if BITS == 5 or BITS == 6:
        at = high + row[:, None, None] * stride_h + (group[None, :, None] * 4 + found)
        found = tl.load(at, mask=keep[:, :, None], other=0).to(tl.int32)
    return found


@triton.jit
def _moved(word, BEGIN: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr):
    """Bits from BEGIN on, put from END on; 0 elsewhere."""
    word = word >> BEGIN - END if BEGIN > END else word << END - BEGIN
    return word & (((1 << WIDTH) - 1) << END)


@triton.jit
def _code(word, above, HALF: tl.constexpr, PLACE: tl.constexpr, BITS: tl.constexpr):
    """float32 [M, G, 4]: 1 + code / 2 ** BITS of the features 4 PLACE + w of a half."""
    code = _moved(word, 8 * PLACE, 15, 8) if BITS == 8 else _moved(word, 16 * HALF + 4 * PLACE, 23 - BITS, 4)
    if BITS == 5:
        code |= _moved(above, 4 * HALF + PLACE, 22, 1)
    if BITS == 6:
        code |= _moved(above, 8 * HALF + 2 * PLACE, 21, 2)
    return (code | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _factor(
    table, outer, row, group, keep, stride_s, stride_o, HALF: tl.constexpr, HALVES: tl.constexpr, OUTER: tl.constexpr
):
    """float32 [M, G]: the scale, or what is least, of a half of groups."""
    found = tl.load(table + row[:, None] * stride_s + ((2 * group + HALF) // HALVES)[None, :], mask=keep, other=0)
    found = found.to(tl.float32)
    if OUTER:
        found *= tl.load(outer + row[:, None] * stride_o + (group // 8)[None, :], mask=keep, other=0.0).to(tl.float32)
    return found


@triton.jit
def _dot_half(x, word, above, group, inside, HALF: tl.constexpr, BITS: tl.constexpr):
    """A token's product with 1 + code / 2 ** BITS of a half of groups, [M, G], and the sum of its features, [1, G]."""
    at = x + (group[None, :, None] * 32 + (HALF * 16 + tl.arange(0, 4)[None, None, :]))
    kept = inside[None, :, None]
    a = tl.load(at, mask=kept, other=0.0).to(tl.float32)
    total = a
    part = _code(word, above, HALF, 0, BITS) * a
    for place in tl.static_range(1, 4):
        a = tl.load(at + 4 * place, mask=kept, other=0.0).to(tl.float32)
        total += a
        part += _code(word, above, HALF, place, BITS) * a
    return tl.sum(part, 2), tl.sum(total, 2)


@triton.jit
def _part(part, total, step, low, BITS: tl.constexpr, OFFSET: tl.constexpr, LEAST: tl.constexpr):
    """float32 [M, G]: a token's product with features, of what `_dot_half` gives."""
    one: tl.constexpr = 1 << BITS
    found = (part * one - total * (low + one)) * step if LEAST == 2 else (part * one - total * (one + OFFSET)) * step
    return found - total * low if LEAST == 1 else found


@triton.jit(do_not_specialize=["per_split", "stride_os"])
def _gguf_few(
    x, codes, high, scale, least, outer, out, groups, rows, column, per_split,
    stride_c, stride_s, stride_h, stride_ob, stride_o, stride_x, stride_os, stride_ot,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HALVES: tl.constexpr, LEAST: tl.constexpr, OUTER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, splits of groups). `per_split`: turns of BLOCK_G groups."""
    await_previous(PDL)
    number = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = number < rows
    row = number.to(tl.int64)
    split = tl.program_id(1)
    acc = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    more = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    turns = tl.cdiv(groups, BLOCK_G)
    for turn in range(split * per_split, tl.minimum(turns, (split + 1) * per_split)):
        group = turn * BLOCK_G + tl.arange(0, BLOCK_G)
        inside = group < groups
        keep = there[:, None] & inside[None, :]
        word = _word(codes, row, group, keep, stride_c, 0, BITS)
        other = word
        if BITS == 8:
            other = _word(codes, row, group, keep, stride_c, 1, BITS)
        above = _above(high, row, group, keep, stride_h, BITS)
        step = _factor(scale, outer, row, group, keep, stride_s, stride_o, 0, HALVES, OUTER)
        low = step
        if LEAST:
            low = _factor(least, outer + stride_ob, row, group, keep, stride_s, stride_o, 0, HALVES, OUTER)
        next_step = step
        next_low = low
        if HALVES == 1:
            next_step = _factor(scale, outer, row, group, keep, stride_s, stride_o, 1, HALVES, OUTER)
            if LEAST:
                next_low = _factor(least, outer + stride_ob, row, group, keep, stride_s, stride_o, 1, HALVES, OUTER)
        for token in tl.static_range(TOKENS):
            at = x + token * stride_x
            first, first_sum = _dot_half(at, word, above, group, inside, 0, BITS)
            second, second_sum = _dot_half(at, other, above, group, inside, 1, BITS)
            if HALVES == 1:
                part = _part(first, first_sum, step, low, BITS, OFFSET, LEAST)
                part += _part(second, second_sum, next_step, next_low, BITS, OFFSET, LEAST)
            else:
                part = _part(first + second, first_sum + second_sum, step, low, BITS, OFFSET, LEAST)
            if token == 0:
                acc += part
            else:
                more += part
    at_out = out + split.to(tl.int64) * stride_os + column + number
    tl.store(at_out, tl.sum(acc, 1).to(out.dtype.element_ty), mask=there)
    if TOKENS == 2:
        tl.store(at_out + stride_ot, tl.sum(more, 1).to(out.dtype.element_ty), mask=there)


@triton.jit
def _half(
    word, above, scale, least, outer, row, group, keep, stride_s, stride_ob, stride_o,
    KIND: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, HALVES: tl.constexpr,
    LEAST: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """[M, G, 16] in the type KIND: a half of groups, feature after feature."""
    step = _factor(scale, outer, row, group, keep, stride_s, stride_o, HALF, HALVES, OUTER)[:, :, None]
    low = step
    if LEAST:
        low = _factor(least, outer + stride_ob, row, group, keep, stride_s, stride_o, HALF, HALVES, OUTER)[:, :, None]
    a = _feature(word, above, step, low, KIND, HALF, 0, BITS, OFFSET, LEAST)
    b = _feature(word, above, step, low, KIND, HALF, 1, BITS, OFFSET, LEAST)
    c = _feature(word, above, step, low, KIND, HALF, 2, BITS, OFFSET, LEAST)
    d = _feature(word, above, step, low, KIND, HALF, 3, BITS, OFFSET, LEAST)
    # [M, G, w, 2, 2], whose last axis is the higher bit of the place.
    every = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 1, 4, 3, 2))
    return tl.reshape(every, [a.shape[0], a.shape[1], 16])


@triton.jit
def _feature(
    word, above, step, low, KIND: tl.constexpr, HALF: tl.constexpr, PLACE: tl.constexpr, BITS: tl.constexpr,
    OFFSET: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    one: tl.constexpr = 1 << BITS
    code = _code(word, above, HALF, PLACE, BITS)
    found = (code * one - (low + one)) * step if LEAST == 2 else (code - (1.0 + OFFSET / one)) * (step * one)
    return (found - low if LEAST == 1 else found).to(KIND)


@triton.jit
def _both(
    codes, high, scale, least, outer, row, group, keep, stride_c, stride_s, stride_h, stride_ob, stride_o,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, HALVES: tl.constexpr, LEAST: tl.constexpr,
    OUTER: tl.constexpr,
):  # fmt: skip
    """[M, G * 32] in the type KIND: features of whole groups, one after another."""
    above = _above(high, row, group, keep, stride_h, BITS)
    word = _word(codes, row, group, keep, stride_c, 0, BITS)
    other = word
    if BITS == 8:
        other = _word(codes, row, group, keep, stride_c, 1, BITS)
    first = _half(
        word, above, scale, least, outer, row, group, keep, stride_s, stride_ob, stride_o, KIND, 0, BITS, OFFSET,
        HALVES, LEAST, OUTER,
    )  # fmt: skip
    second = _half(
        other, above, scale, least, outer, row, group, keep, stride_s, stride_ob, stride_o, KIND, 1, BITS, OFFSET,
        HALVES, LEAST, OUTER,
    )  # fmt: skip
    every = tl.permute(tl.join(first, second), (0, 1, 3, 2))
    return tl.reshape(every, [first.shape[0], first.shape[1] * 32])


@triton.jit(do_not_specialize=["tokens", "per_split", "stride_os"])
def _gguf_tile(
    x, codes, high, scale, least, outer, out, groups, rows, column, per_split, tokens,
    stride_c, stride_s, stride_h, stride_ob, stride_o, stride_x, stride_os, stride_ot,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HALVES: tl.constexpr, LEAST: tl.constexpr, OUTER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of tokens, splits of groups). Weights are the left factor: tensor cores take that
    from registers."""
    await_previous(PDL)
    number = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    there, some = number < rows, token < tokens
    row = number.to(tl.int64)
    k = tl.arange(0, BLOCK_G * 32)
    at_x = x + token.to(tl.int64)[None, :] * stride_x + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    turns = tl.cdiv(groups, BLOCK_G)
    for turn in range(split * per_split, tl.minimum(turns, (split + 1) * per_split)):
        group = turn * BLOCK_G + tl.arange(0, BLOCK_G)
        keep = there[:, None] & (group < groups)[None, :]
        inside = turn * BLOCK_G * 32 + k < groups * 32
        a = tl.load(at_x + turn * BLOCK_G * 32, mask=inside[:, None] & some[None, :], other=0.0)
        w = _both(
            codes, high, scale, least, outer, row, group, keep, stride_c, stride_s, stride_h, stride_ob, stride_o,
            x.dtype.element_ty, BITS, OFFSET, HALVES, LEAST, OUTER,
        )  # fmt: skip
        acc = tl.dot(w, a, acc, input_precision="ieee")
    at = out + split.to(tl.int64) * stride_os + token.to(tl.int64)[None, :] * stride_ot + (column + number)[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=some[None, :] & there[:, None])


@triton.jit(do_not_specialize=["count", "begin"])
def _gguf_rows(
    ids, codes, high, scale, least, outer, out, groups, rows, count, begin,
    stride_c, stride_s, stride_h, stride_ob, stride_o, stride_out,
    BITS: tl.constexpr, OFFSET: tl.constexpr, HALVES: tl.constexpr, LEAST: tl.constexpr, OUTER: tl.constexpr,
    CHOSEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of groups). CHOSEN: the rows `ids - begin`, where there are such; otherwise the
    `count` rows from `begin` on."""
    await_previous(PDL)
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    some = place < count
    if CHOSEN:
        row = tl.load(ids + place, mask=some, other=0).to(tl.int64) - begin
        some = some & (row >= 0) & (row < rows)
    else:
        row = begin + place.to(tl.int64)
    w = _both(
        codes, high, scale, least, outer, row, group, some[:, None] & (group < groups)[None, :], stride_c, stride_s,
        stride_h, stride_ob, stride_o, out.dtype.element_ty, BITS, OFFSET, HALVES, LEAST, OUTER,
    )  # fmt: skip
    k = tl.program_id(1) * BLOCK_G * 32 + tl.arange(0, BLOCK_G * 32)
    at = out + place.to(tl.int64)[:, None] * stride_out + k[None, :]
    tl.store(at, w, mask=some[:, None] & (k < groups * 32)[None, :])


def _blocks(x_TN: Tensor) -> tuple[int, int, int]:
    """(Rows of a program, groups of a turn, warps). For few tokens there are as many groups as threads: each thread has
    its own of all the rows, and reads its features of x once for them."""
    tokens, features = x_TN.shape  # not none
    if tokens > FEW:
        return 64, 2 if x_TN.dtype == torch.float32 else 4, 8 if torch.version.hip else 4
    warps = min(4, power_of_2(ceil_div(features // GROUP, 32)))
    return (4 if torch.version.hip else 8) // tokens, 32 * warps, warps  # more spill registers on gfx1100


def grouped_gemm(x_TN: Tensor, runs: Sequence[Run], bias_M: Tensor | None = None, splits: int | None = None) -> Tensor:
    """x [T, N] times the transposed matrix of these rows, N a multiple of 32, plus a bias -> [T, M] in x's type."""
    tokens, features = x_TN.shape
    outputs = sum(len(run.codes) for run in runs)
    if features != runs[0].features:
        raise ValueError(f"the weight takes {runs[0].features} inputs, not {features}")
    if tokens >= MANY and splits is None:
        return _by_copies(x_TN, runs, outputs, bias_M)
    out = torch.empty((tokens, outputs), dtype=x_TN.dtype, device=x_TN.device)
    if tokens == 0:
        return out
    few, block_t, (block_m, block_g, warps) = tokens <= FEW, max(16, min(64, power_of_2(tokens))), _blocks(x_TN)
    turns = ceil_div(features // GROUP, block_g)
    if splits is None:
        tiles = sum(ceil_div(len(run.codes), block_m) for run in runs) * ceil_div(tokens, block_t)
        # Programs of few tokens are small: eight a processor keep enough loads in flight.
        wanted = 8 if few else 2
        splits = max(1, min(turns if few else turns // 4, wanted * multiprocessors(x_TN) // tiles))
    per_split = ceil_div(turns, splits)
    splits = ceil_div(turns, per_split)
    target, direct = split_target(out, splits, bias_M)
    column = 0
    for run in runs:
        blocks = ceil_div(len(run.codes), block_m)
        codes, high, scale, least, outer, *strides = _arguments(run)
        sizes = features // GROUP, len(run.codes), column, per_split
        strides = *strides, x_TN.stride(0), target.stride(0), target.stride(1)
        given = x_TN, codes, high, scale, least, outer, target, *sizes
        sized: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_G": block_g, "num_warps": warps, **early(x_TN)}
        if few:
            _gguf_few[(blocks, splits)](*given, *strides, TOKENS=tokens, **_constants(run), **sized)
        else:
            grid = blocks, ceil_div(tokens, block_t), splits
            sized["num_stages"] = stages(3)
            _gguf_tile[grid](*given, tokens, *strides, BLOCK_T=block_t, **_constants(run), **sized)
        column += len(run.codes)
    return out if direct else sum_splits(target, bias_M, out)


def _by_copies(x_TN: Tensor, runs: Sequence[Run], outputs: int, bias_M: Tensor | None) -> Tensor:
    """The vendor's product with a copy in the type of x, of some rows at a time."""
    features = x_TN.shape[1]
    most = max(GROUP, _COPIED // features)
    if outputs <= most:
        return F.linear(x_TN, widened_rows(runs, 0, outputs, x_TN.dtype), bias_M)
    out = torch.empty((len(x_TN), outputs), dtype=x_TN.dtype, device=x_TN.device)
    for begin in range(0, outputs, most):
        end = min(outputs, begin + most)
        some = None if bias_M is None else bias_M[begin:end]
        out[:, begin:end] = F.linear(x_TN, widened_rows(runs, begin, end, x_TN.dtype), some)
    return out


def widened_rows(runs: Sequence[Run], begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows from `begin` to before `end`, [end - begin, N]."""
    out = torch.empty((end - begin, runs[0].features), dtype=dtype, device=runs[0].codes.device)
    start = 0
    for run in runs:
        first, last = max(begin, start), min(end, start + len(run.codes))
        if first < last:
            _fill_rows(run, out[first - begin :], None, last - first, first - start)
        start += len(run.codes)
    return out


def chosen_rows(runs: Sequence[Run], ids_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows by their numbers, [T, N]. What is written of a row that the matrix has not is undefined."""
    out = torch.empty((len(ids_T), runs[0].features), dtype=dtype, device=ids_T.device)
    start = 0
    for run in runs:
        if len(ids_T):
            _fill_rows(run, out, ids_T.contiguous(), len(ids_T), start)
        start += len(run.codes)
    return out


def _fill_rows(run: Run, out: Tensor, ids_T: Tensor | None, count: int, begin: int) -> None:
    groups = run.features // GROUP
    block_g = min(32, power_of_2(groups))
    codes, high, scale, least, outer, *strides = _arguments(run)
    _gguf_rows[(ceil_div(count, _ROWS), ceil_div(groups, block_g))](
        *(run.codes if ids_T is None else ids_T, codes, high, scale, least, outer, out),
        *(groups, len(run.codes), count, begin, *strides, out.stride(0)),
        CHOSEN=ids_T is not None,
        BLOCK_M=_ROWS,
        BLOCK_G=block_g,
        num_warps=4,
        **_constants(run),
        **early(out),
    )
