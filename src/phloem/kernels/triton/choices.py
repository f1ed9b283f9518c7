"""The sum of what a token's experts gave, choice by choice in their order."""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton._base import ceil_div, power_of_2
from phloem.kernels.triton.early import await_previous, early


@triton.jit
def _sum_choices(
    parts,
    ids,
    out,
    features,
    experts,
    CHOICES: tl.constexpr,
    FOREIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """FOREIGN: ids may be of no expert here, and then there is no part."""
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < features
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(CHOICES):
        end = features
        if FOREIGN:
            expert = tl.load(ids + token * CHOICES + choice)
            end = tl.where((expert >= 0) & (expert < experts), features, 0)
        at = parts + (token * CHOICES + choice) * features + col
        total += tl.load(at, mask=col < end, other=0.0).to(tl.float32)
    tl.store(out + token * features + col, total.to(out.dtype.element_ty), mask=keep)


def sum_choices(parts: Tensor, ids_Tk: Tensor, experts: int, *, foreign: bool) -> Tensor:
    """[T, N] of the parts of pairs, [T * k, N]. `foreign`: ids may be of none of the `experts` here, and then there is
    no part."""
    (tokens, choices), features = ids_Tk.shape, parts.shape[1]
    out = torch.empty((tokens, features), dtype=parts.dtype, device=parts.device)
    block = min(1024, power_of_2(features))
    _sum_choices[(tokens, ceil_div(features, block))](
        *(parts, ids_Tk, out, features, experts),
        CHOICES=choices,
        FOREIGN=foreign,
        BLOCK=block,
        **early(out),
    )
    return out
