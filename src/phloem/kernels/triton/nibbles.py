"""Weights of 4 bits, widened in registers: integers with a scale and a zero point per group, and 4-bit floats (e2m1)
with a power of two per 32 inputs (MXFP4; OCP Microscaling, 2023).

Both lie in the order of `gemm_int.pack_int4`: byte j of a group holds element j in its low half and element
j + GROUP / 2 in its high one. A code becomes a number by its bits alone: a conversion from integers costs more than all
else. What is multiplied is scaled already, and rounded as the unpacked matrix would be.
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

from phloem.kernels.narrow import MOST_POWER
from phloem.kernels.triton._device import capability
from phloem.kernels.triton.gemm_int import pack_int4

PLAIN, INT4, MXFP4 = 0, 1, 2  # how the weights of a product are stored
FLOAT_GROUP = 32  # columns that share a power of two
MOST_EXPONENT = 127 + MOST_POWER  # as it is stored
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def warp_groups(device: torch.device) -> bool:
    """Whether four warps multiply together there, of what they have in registers (`wgmma`): tiles may be large."""
    return capability(device) >= 90


@triton.jit
def number_of(code, WIDTH: tl.constexpr):
    """float32 of codes 0 to 15: themselves, or of e2m1 the 2^14th part of their values."""
    if WIDTH == 1:
        # As the last bits of a float32 of 2^23, whose steps are 1.
        return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        # Sign, exponent and mantissa where float16 has its own, whose exponents begin 14 lower.
        wide = code.to(tl.int32)
        bits = ((wide & 8) << 12) | ((wide & 7) << 9)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def step_of(stored, WIDTH: tl.constexpr):
    """float32 scales, of what `number_of` gives."""
    if WIDTH == 1:
        return stored.to(tl.float32)
    else:
        exponent = tl.minimum(stored.to(tl.int32), 240) + 14
        return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def scales_at(at_scale, at_zero, begin, end, inside, group, stride_g, ZEROS: tl.constexpr, GROUP: tl.constexpr):
    """Scales and zero points of groups of columns from `begin` on, as they are stored, [ROWS, GROUPS]; without zero
    points the second are the first. at_scale, at_zero: of each row's first group."""
    whole = inside[:, None] & (begin + group * GROUP < end)[None, :]
    place = (begin // GROUP + group)[None, :] * stride_g
    step = tl.load(at_scale[:, None] + place, mask=whole, other=0)
    if ZEROS:
        return step, tl.load(at_zero[:, None] + place, mask=whole, other=0)
    else:
        return step, step


@triton.jit
def shift_of(step, zero, ZEROS: tl.constexpr):
    """What is taken away from a scaled integer: its zero point times its scale, exact in float32 of two float16."""
    if ZEROS:
        return zero.to(tl.float32) * step
    else:
        return step * 8.0


@triton.jit
def widened_halves(
    both,
    stored,
    zero,
    WIDTH: tl.constexpr,
    ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Rows of GROUPS groups as two matrices [ROWS, GROUPS * HALF] of `TYPE`: their first halves, and their second ones.

    both: bytes [ROWS, GROUPS, HALF]; stored, zero: of `scales_at`.
    """
    step = step_of(stored, WIDTH)
    low, high = number_of(both & 15, WIDTH) * step[:, :, None], number_of(both >> 4, WIDTH) * step[:, :, None]
    if WIDTH == 1:
        shift = shift_of(step, zero, ZEROS)[:, :, None]  # one fused operation with the scale, rounded once
        low, high = low - shift, high - shift
    first = tl.reshape(low.to(TYPE), [ROWS, GROUPS * HALF])
    second = tl.reshape(high.to(TYPE), [ROWS, GROUPS * HALF])
    return first, second


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The weights of one product of E experts of R rows: plain [E * R, N], or packed uint8 [E * R, N / 2] with scales
    [E, G, R], and perhaps zero points. Rows lie side by side there, as a tile needs them."""

    values: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def width(self) -> int:
        """How they are stored."""
        if self.scale is None:
            return PLAIN
        return MXFP4 if self.scale.dtype == torch.uint8 else INT4

    @property
    def group(self) -> int:
        """Columns that share a scale; 1 of plain ones."""
        return 1 if self.scale is None else 2 * self.values.shape[1] // self.scale.shape[1]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
        """What kernels are given: values, scales, zero points, and how far rows of values, and experts and groups of
        scales, are apart."""
        if self.scale is None:
            return self.values, self.values, self.values, self.values.stride(0), 0, 0
        zero = self.scale if self.zero is None else self.zero
        return self.values, self.scale, zero, self.values.stride(0), self.scale.stride(0), self.scale.stride(1)


def pack_mxfp4(codes_MN: Tensor) -> Tensor:
    """Codes of e2m1, 0 to 15 [M, N] -> uint8 [M, N / 2] in this file's order; N must be a multiple of 32."""
    return pack_int4(codes_MN, FLOAT_GROUP)


def scales_of(scale_EGR: Tensor, ids: Tensor) -> Tensor:
    """Of some rows of all experts, [n, G]."""
    rows = scale_EGR.shape[2]
    return scale_EGR[ids // rows, :, ids % rows]


def put_scales(scale_EGR: Tensor, start: int, values_MG: Tensor) -> None:
    """From row `start` of all experts on; the rows are one expert's, or those of whole experts."""
    rows = scale_EGR.shape[2]
    if start // rows == (start + len(values_MG) - 1) // rows:
        scale_EGR[start // rows, :, start % rows : start % rows + len(values_MG)] = values_MG.T
        return
    for first in range(0, len(values_MG), rows):
        put_scales(scale_EGR, start + first, values_MG[first : first + rows])


def unpack_mxfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """float32 [M, N] of packed rows and their exponents, uint8 [M, N / 32]."""
    halves = packed.unflatten(1, (scale.shape[1], -1))
    codes = torch.cat((halves & 15, halves >> 4), -1)
    exponent = scale.to(torch.int32).clamp_max(MOST_EXPONENT) - 127
    step = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent).float()
    return (torch.tensor(E2M1, device=packed.device)[codes.int()] * step[..., None]).flatten(1)
