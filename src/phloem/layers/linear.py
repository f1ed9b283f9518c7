"""Linear layers, fused where several read the same input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.layers.weight import Layer, projections

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from phloem.layers.context import BuildContext
    from phloem.layers.norm import RMSNorm
    from phloem.layers.weight import Cut, Projection


class Linear(Layer):
    """One matrix product for one or more projections of the same input.

    Args:
        ctx: its name is the parent's; the checkpoint tensors are `<ctx.name>.<part>.weight` (and `.bias`).
        in_features: width of the input.
        parts: projection name -> output width, in the order in which the outputs are stacked; or a `Projection`, where
            the checkpoint fuses several into one tensor, or ranks share it out.
        bias: whether the projections have a bias.
        cut: which of the inputs this rank has.
    """

    def __init__(
        self,
        ctx: BuildContext,
        in_features: int,
        parts: Mapping[str, int | Projection],
        *,
        bias: bool = False,
        cut: Cut | None = None,
    ) -> None:
        self.ops = ctx.ops
        self.weight, self.bias = projections(ctx, in_features, parts, bias=bias, cut=cut)

    def __call__(self, x_TN: Tensor) -> Tensor:
        """[T, in_features] -> [T, sum of the parts' widths]."""
        return self.ops.linear(x_TN, self.weight.value, self._bias)

    def gated(self, x_TN: Tensor, activation: str) -> Tensor:
        """For a gate and an up projection: activation(gate(x)) * up(x). `activation`: "silu" or "gelu_tanh"."""
        if self.ops.gated_linear is not None:
            return self.ops.gated_linear(x_TN, self.weight.value, self._bias, activation)
        act = self.ops.silu_and_mul if activation == "silu" else self.ops.gelu_tanh_and_mul
        return act(self(x_TN))

    def normed(
        self, norm: RMSNorm, x_TN: Tensor, residual_TN: Tensor | None, activation: str = ""
    ) -> tuple[Tensor, Tensor]:
        """(this layer, or with `activation` its gated form, of norm(x + residual); x + residual).

        Here and in `add` it is decided between a table's fused op and its separate ones.
        """
        if self.ops.norm_linear is not None:
            return self.ops.norm_linear(
                x_TN, residual_TN, norm.weight.value, norm.eps, self.weight.value, self._bias, activation
            )
        normed_TN, residual_TN = norm.add(x_TN, residual_TN)
        return self.gated(normed_TN, activation) if activation else self(normed_TN), residual_TN

    def add(self, x_TN: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        """This layer plus the residual: (the sum, None), or both apart, for the norm that follows to add them."""
        if self.ops.linear_add is not None:
            return self.ops.linear_add(x_TN, self.weight.value, self._bias, residual_TN)
        return self(x_TN), residual_TN

    @property
    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.value
