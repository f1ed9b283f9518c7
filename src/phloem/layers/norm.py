"""Norms of the last axis: root mean square (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.kernels.calls import Norm
from phloem.layers.weight import Layer, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.distributed.comm import Comm
    from phloem.layers.context import BuildContext


class RMSNorm(Layer):
    """Normalises the last axis. `shift` 1.0 is for checkpoints that store weight - 1.

    `comm`: ranks that have the same share of that axis each; several may have the same one.
    """

    comm: Comm | None = None

    def __init__(self, ctx: BuildContext, size: int, eps: float, shift: float = 0.0) -> None:
        self.ops = ctx.ops
        self.eps = eps
        self.weight = Weight((f"{ctx.name}.weight",), ((size,),), "norm", shift)

    @property
    def before(self) -> Norm | None:
        """This norm as a linear op takes it, to normalise its input; None: no op fuses it."""
        return None if self.comm is not None else Norm(self.weight.value, self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self.comm is None:
            return self.ops.rms_norm(x, self.weight.value, self.eps)
        wide = x.float()
        mean = self.comm.all_reduce(wide.square().sum(-1, keepdim=True)) / (x.shape[-1] * self.comm.size)
        return (wide * torch.rsqrt(mean + self.eps) * self.weight.value).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); without residual (norm(x), x)."""
        if residual is None:
            return self(x), x
        if self.comm is not None:
            total = self.ops.add(x, residual)
            return self(total), total
        return self.ops.add_rms_norm(x, residual, self.weight.value, self.eps)


class LayerNorm(Layer):
    """Normalises the last axis around its mean. `bias`: there is one. `shift` as in `RMSNorm`."""

    before: Norm | None = None

    def __init__(self, ctx: BuildContext, size: int, eps: float, shift: float = 0.0, *, bias: bool = True) -> None:
        self.ops, self.eps = ctx.ops, eps
        self.weight = Weight((f"{ctx.name}.weight",), ((size,),), "norm", shift)
        self.bias = Weight((f"{ctx.name}.bias",), ((size,),), "norm") if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight.value, None if self.bias is None else self.bias.value, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); without residual (norm(x), x)."""
        total = x if residual is None else self.ops.add(x, residual)
        return self(total), total


class BareLayerNorm(Layer):
    """A layer norm without weights."""

    before: Norm | None = None

    def __init__(self, ctx: BuildContext, size: int, eps: float) -> None:
        self.ops, self.eps, self.ones = ctx.ops, eps, torch.ones(size, device=ctx.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.ones, None, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); without residual (norm(x), x)."""
        total = x if residual is None else self.ops.add(x, residual)
        return self(total), total


AnyNorm = RMSNorm | LayerNorm | BareLayerNorm
