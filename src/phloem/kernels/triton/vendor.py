"""The vendor's float8 product (`torch.nn.functional.scaled_mm`) with a scale per 128 features, where it serves.

Whether it does is found out once per device, by one small product beside the same one in float32, and told in the log.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.kernels import chosen
from phloem.utils import log

_log = log.get("kernels.triton")

GROUP = 128
VENDOR_TOKENS = 64  # fewer leave most of the vendor's tiles of 64 or 128 rows empty
STEP = 4 * GROUP  # what the features must be a multiple of: scales are read four at a time


@dataclass(frozen=True, slots=True)
class Vendor:
    """Whether the vendor multiplies blocks of scaled float8 here, and why (not)."""

    serves: bool
    reason: str


def fits(tokens: int, weight_MN: Tensor) -> bool:
    """Whether the vendor's product takes these sizes, and enough of them."""
    outputs, features = weight_MN.shape
    return tokens >= VENDOR_TOKENS and features % STEP == 0 and outputs % GROUP == 0


def block_product(
    x_TN: Tensor, x_scale: Tensor, weight_MN: Tensor, weight_scale: Tensor, bias_M: Tensor | None
) -> Tensor:
    """bfloat16 [T, M] of float8 x with scales [T, N / 128] and a weight with [M / 128, N / 128]."""
    kinds: Any = F.ScalingType  # pyright: ignore[reportAttributeAccessIssue] - newer than torch's stubs
    swizzle: Any = F.SwizzleType  # pyright: ignore[reportAttributeAccessIssue]
    product: Any = F.scaled_mm  # pyright: ignore[reportAttributeAccessIssue]
    return product(
        x_TN,
        weight_MN.t(),
        x_scale.t().contiguous().t(),  # the vendor reads scales of neighbouring tokens side by side
        kinds.BlockWise1x128,
        weight_scale.t(),
        kinds.BlockWise128x128,
        swizzle.NO_SWIZZLE,
        swizzle.NO_SWIZZLE,
        bias=bias_M,
        output_dtype=torch.bfloat16,
    )


def serves_blocks(device: torch.device, float8: torch.dtype) -> bool:
    """Whether `block_product` is to be used on this device. Tries it at the first call outside of a recording."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return device.type == "cuda" and _known.get((device.index or 0, float8), Vendor(False, "")).serves
    return _tried(device.index or 0, float8).serves


_known: dict[tuple[int, torch.dtype], Vendor] = {}


@cache
def _tried(index: int, float8: torch.dtype) -> Vendor:
    found = _known[index, float8] = _try(torch.device("cuda", index), float8)
    name = "torch's scaled_mm" if found.serves else "the Triton kernel"
    chosen.note(f"float8 products with block scales, {VENDOR_TOKENS} tokens and more", name, found.reason)
    _log.info("float8 products with block scales of %d tokens and more: %s (%s)", VENDOR_TOKENS, name, found.reason)
    return found


def _try(device: torch.device, float8: torch.dtype) -> Vendor:
    if not hasattr(F, "scaled_mm"):
        return Vendor(False, f"torch {torch.__version__} has none")
    try:
        values, error = _errs(device, float8)
    except Exception as refused:  # of whatever kind: the product is tried in order to learn whether it works
        return Vendor(False, f"it refuses: {str(refused).splitlines()[0][:200]}")
    if not error <= 0.02:
        return Vendor(False, f"a trial is off by {error:.2g} of {values:.2g}")
    return Vendor(True, f"a trial is off by {error:.2g} of its norm")


def _errs(device: torch.device, float8: torch.dtype) -> tuple[float, float]:
    """(Norm, relative error) of a small product with a scale of its own in every block."""
    tokens, outputs, features = VENDOR_TOKENS, 2 * GROUP, 2 * STEP
    generator = torch.Generator(device).manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, weight = drawn(tokens, features).to(float8), drawn(outputs, features).to(float8)
    x_scale = drawn(tokens, features // GROUP).abs() + 0.1
    weight_scale = drawn(outputs // GROUP, features // GROUP).abs() + 0.1
    got = block_product(x, x_scale, weight, weight_scale, None).float()
    wide = weight_scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1) * weight.float()
    want = (x.float() * x_scale.repeat_interleave(GROUP, 1)) @ wide.t()
    return float(want.norm()), float((got - want).norm() / want.norm())
