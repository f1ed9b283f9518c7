"""What stands around recurrent mixers: steps and decays before the scan, norms that are gated behind it."""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels import reference_models
from phloem.kernels.triton._base import ceil_div, power_of_2, silu
from phloem.kernels.triton.early import await_previous, early

_LARGEST = 32768  # numbers that a program normalises together


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), and x itself above 20, as torch has it."""
    soft = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    # Where exp(x) is small, 1 + exp(x) would lose most of it: the series of the logarithm.
    low = tl.exp(tl.minimum(x, 0.0))
    series = low * (1.0 - low * (1 / 2 - low * (1 / 3 - low * (1 / 4 - low * (1 / 5 - low / 6)))))
    soft = tl.where(low < 0.0625, series, soft)
    return tl.where(x > 20.0, x, soft)


@triton.jit(do_not_specialize=["tokens"])
def _step_sizes(
    dt, bias, out, tokens, width, stride, lowest, highest, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, blocks of columns)."""
    await_previous(PDL)
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    some = (t < tokens)[:, None] & (n < width)[None, :]
    given = tl.load(dt + t[:, None] * stride + n[None, :], mask=some, other=0.0).to(tl.float32)
    given += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    steps = tl.minimum(tl.maximum(_softplus(given), lowest), highest)
    tl.store(out + t[:, None] * width + n[None, :], steps, mask=some)


def _tile(width: int) -> tuple[int, int]:
    """(Tokens, columns) of a program of elementwise work."""
    columns = min(256, power_of_2(width))
    return max(4, 1024 // columns), columns


def step_sizes(dt_TH: Tensor, bias_H: Tensor, lowest: float, highest: float) -> Tensor:
    """As `reference_scan.step_sizes`."""
    tokens, width = dt_TH.shape
    out = torch.empty((tokens, width), dtype=torch.float32, device=dt_TH.device)
    if out.numel():
        block_t, block_n = _tile(width)
        _step_sizes[(ceil_div(tokens, block_t), ceil_div(width, block_n))](
            dt_TH, bias_H, out, tokens, width, dt_TH.stride(0), float(lowest), float(highest),
            BLOCK_T=block_t, BLOCK_N=block_n, **early(out),
        )  # fmt: skip
    return out


@triton.jit
def _decays(log, out, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    await_previous(PDL)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rate = -tl.exp(tl.load(log + n, mask=n < count, other=0.0).to(tl.float32))
    tl.store(out + n, rate.to(out.dtype.element_ty), mask=n < count)


def decays(log: Tensor) -> Tensor:
    """As `reference_scan.decays`."""
    out = torch.empty(log.shape, dtype=log.dtype, device=log.device)
    if log.numel():
        block = min(1024, power_of_2(log.numel()))
        _decays[(ceil_div(log.numel(), block),)](log.contiguous(), out, log.numel(), BLOCK=block, **early(out))
    return out


@triton.jit(do_not_specialize=["tokens"])
def _delta_gates(
    a, b, bias, log, decay, beta, tokens, width, stride_a, stride_b, EACH: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, blocks of columns); EACH columns belong to a head, the first of which also writes what
    the head writes of its own."""
    await_previous(PDL)
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = n // EACH
    some = (t < tokens)[:, None] & (n < width)[None, :]
    given = tl.load(a + t[:, None] * stride_a + n[None, :], mask=some, other=0.0).to(tl.float32)
    given += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    rate = -tl.exp(tl.load(log + head, mask=n < width, other=0.0).to(tl.float32))
    tl.store(decay + t[:, None] * width + n[None, :], _softplus(given) * rate[None, :], mask=some)
    first = some & (n % EACH == 0)[None, :]
    own = tl.load(b + t[:, None] * stride_b + head[None, :], mask=first, other=0.0).to(tl.float32)
    tl.store(beta + t[:, None] * (width // EACH) + head[None, :], tl.sigmoid(own), mask=first)


def delta_gates(a_TH: Tensor, b_TH: Tensor, bias_H: Tensor, log_H: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference_scan.delta_gates`."""
    tokens, heads = b_TH.shape
    each = a_TH.shape[2] if a_TH.dim() == 3 else 1
    decay = torch.empty(a_TH.shape, dtype=torch.float32, device=a_TH.device)
    beta = torch.empty((tokens, heads), dtype=torch.float32, device=a_TH.device)
    if beta.numel():
        a_TN = a_TH.flatten(1)
        block_t, block_n = _tile(heads * each)
        _delta_gates[(ceil_div(tokens, block_t), ceil_div(heads * each, block_n))](
            a_TN, b_TH, bias_H.contiguous(), log_H.contiguous(), decay, beta, tokens, heads * each, a_TN.stride(0),
            b_TH.stride(0), EACH=each, BLOCK_T=block_t, BLOCK_N=block_n, **early(decay),
        )  # fmt: skip
    return decay, beta


@triton.jit
def _gated_rms_norm(
    x, gate, weight, out, eps, stride_xt, stride_xg, stride_gt, stride_gg, stride_w,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, groups of a token's numbers that are normalised together)."""
    await_previous(PDL)
    t = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    n = tl.arange(0, BLOCK)
    some = n < SIZE
    value = tl.load(x + t * stride_xt + group * stride_xg + n, mask=some, other=0.0).to(tl.float32)
    opened = silu(tl.load(gate + t * stride_gt + group * stride_gg + n, mask=some, other=0.0).to(tl.float32))
    if not NORM_FIRST:
        value = value * opened
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + eps)
    value = value * tl.load(weight + group * stride_w + n, mask=some, other=0.0).to(tl.float32)
    if NORM_FIRST:
        value = value * opened
    tl.store(out + (t * GROUPS + group) * SIZE + n, value.to(out.dtype.element_ty), mask=some)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, group: int = 0, norm_first: bool = False
) -> Tensor:
    """As `reference_models.gated_rms_norm`, of [T, N] in groups or of [T, H, D] in heads."""
    size = group or x.shape[-1]
    heads = x.dim() == 3
    if x.dim() not in (2, 3) or (heads and size != x.shape[-1]) or size > _LARGEST:
        return reference_models.gated_rms_norm(x, gate, weight, eps, group, norm_first)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        x_TGS, gate_TGS = (x, gate) if heads else (x.unflatten(1, (-1, size)), gate.unflatten(1, (-1, size)))
        block = power_of_2(size)
        _gated_rms_norm[(x_TGS.shape[0], x_TGS.shape[1])](
            x_TGS, gate_TGS, weight, out, eps, *x_TGS.stride()[:2], *gate_TGS.stride()[:2], 0 if heads else size,
            GROUPS=x_TGS.shape[1], SIZE=size, NORM_FIRST=norm_first, BLOCK=block,
            num_warps=1 if block <= 256 else 4 if block <= 4096 else 16, **early(out),
        )  # fmt: skip
    return out
