"""Activations to float8, with a scale per token or per token and group of features; one pass each."""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton._base import ceil_div, fp8_limit, power_of_2
from phloem.kernels.triton.early import await_previous, early

GROUP = 128


@triton.jit
def _quantise_row(x, out, scale, stride_x, features, LIMIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    most = 0.0
    for start in range(0, features, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride_x + col, mask=col < features, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(value), axis=0))
    # An all-zero row must not divide by zero; its scale is then the least that is of use.
    step = tl.maximum(most, 1e-10) / LIMIT
    tl.store(scale + row, step)
    for start in range(0, features, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride_x + col, mask=col < features, other=0.0).to(tl.float32) / step
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
        tl.store(out + row * features + col, value.to(out.dtype.element_ty), mask=col < features)


@triton.jit
def _quantise_groups(
    x,
    out,
    scale,
    stride_x,
    features,
    groups,
    LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    keep = col < features
    value = tl.load(x + row * stride_x + col, mask=keep, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(value), axis=1), 1e-10) / LIMIT
    tl.store(scale + row * groups + group, step, mask=group < groups)
    value = tl.minimum(tl.maximum(value / step[:, None], -LIMIT), LIMIT)
    tl.store(out + row * features + col, value.to(out.dtype.element_ty), mask=keep)


def per_token_fp8(x_TN: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """(values, float32 scales [T]): x is about values * scale, the row's largest magnitude at the type's limit."""
    tokens, features = x_TN.shape
    out = torch.empty((tokens, features), dtype=dtype, device=x_TN.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x_TN.device)
    if tokens:
        _quantise_row[(tokens,)](
            x_TN,
            out,
            scale,
            x_TN.stride(0),
            features,
            LIMIT=fp8_limit(dtype),
            BLOCK=min(4096, power_of_2(features)),
            **early(x_TN),
        )
    return out, scale


def per_group_fp8(x_TN: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """(values, float32 scales [T, ceil(N / 128)]): a scale for each token and each 128 features."""
    tokens, features = x_TN.shape
    groups = ceil_div(features, GROUP)
    out = torch.empty((tokens, features), dtype=dtype, device=x_TN.device)
    scale = torch.empty((tokens, groups), dtype=torch.float32, device=x_TN.device)
    if tokens:
        block = min(8, power_of_2(groups))
        _quantise_groups[(tokens, ceil_div(groups, block))](
            x_TN,
            out,
            scale,
            x_TN.stride(0),
            features,
            groups,
            LIMIT=fp8_limit(dtype),
            GROUP=GROUP,
            BLOCK_G=block,
            **early(x_TN),
        )
    return out, scale
