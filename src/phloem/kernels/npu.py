"""The op table of Ascend NPUs: fused ops of torch_npu by their documented names, plain torch for all else.

torch_npu gains and loses ops from version to version, so each is looked for and done without where it is not. Never run
on an NPU: tests compute these calls by what the documentation says that the fused ops do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels import compose
from phloem.kernels import reference as ref
from phloem.kernels.ops import Ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NORM, ADD_NORM, GATE, TURN = "npu_rms_norm", "npu_add_rms_norm", "npu_swiglu", "npu_rotary_mul"
FUSED = (NORM, ADD_NORM, GATE, TURN)
MOST_HEADS, MOST_TURNED = 1000, 896  # what the rotation's documentation bounds, exclusive


def found(library: Any) -> list[str]:
    """Which of the fused ops this torch_npu has."""
    return [name for name in FUSED if hasattr(library, name)]


def table(library: Any) -> Ops:
    """The table over `library`, torch_npu or what stands in for it in a test."""
    has = found(library)
    changes: dict[str, Any] = {}
    if NORM in has:
        changes["rms_norm"] = _rms_norm(library)
    if ADD_NORM in has:
        changes["add_rms_norm"] = _add_rms_norm(library)
    if GATE in has:
        changes["silu_and_mul"] = _silu_and_mul(library)
    linear = compose.linear_of(ref.product, **changes)
    if TURN in has:
        changes["rope_"] = _rope(library)
    return Ops(name="npu", linear=linear, **changes)


def _rms_norm(library: Any) -> Callable[[Tensor, Tensor, float], Tensor]:
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if weight.dtype != x.dtype:  # the fused op wants one type
            return ref.rms_norm(x, weight, eps)
        return library.npu_rms_norm(x, weight, epsilon=eps)[0]

    return rms_norm


def _add_rms_norm(library: Any) -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not x.dtype == residual.dtype == weight.dtype:
            return ref.add_rms_norm(x, residual, weight, eps)
        normed, _, total = library.npu_add_rms_norm(x, residual, weight, epsilon=eps)
        return normed, total

    return add_rms_norm


def _silu_and_mul(library: Any) -> Callable[[Tensor], Tensor]:
    def silu_and_mul(x: Tensor) -> Tensor:
        return library.npu_swiglu(x, dim=-1)

    return silu_and_mul


def _rope(library: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]:
    def rope_(q_THD: Tensor, k_TKD: Tensor, positions_T: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
        turned = 2 * cos_sin.shape[-1]
        if max(q_THD.shape[1], k_TKD.shape[1]) >= MOST_HEADS or turned >= MOST_TURNED:
            ref.rope_(q_THD, k_TKD, positions_T, cos_sin, interleaved)
            return
        both = cos_sin[positions_T]
        # The fused op wants the cosine of every feature, where ours has one of every pair.
        both = both.repeat_interleave(2, -1) if interleaved else torch.cat((both, both), -1)
        cos, sin = both[None, :, :, None].unbind(2)  # [1, T, 1, turned] each
        more = {"rotary_mode": "interleave"} if interleaved else {}  # earlier versions have the other mode alone
        for x in (q_THD, k_TKD):
            part = x[..., :turned]
            # In float32, as the specification is; the op takes x as [B, S, N, D].
            part.copy_(library.npu_rotary_mul(part.float()[None], cos, sin, **more)[0])

    return rope_
