"""Linear layers, fused where several read the same input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.layers.weight import Layer, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext


class Linear(Layer):
    """One matrix product for one or more projections of the same input.

    Args:
        ctx: its name is the parent's; the checkpoint tensors are `<ctx.name>.<part>.weight` (and `.bias`).
        in_features: width of the input.
        parts: projection name -> output width, in the order in which the outputs are stacked.
        bias: whether the projections have a bias.
    """

    def __init__(self, ctx: BuildContext, in_features: int, parts: dict[str, int], *, bias: bool = False) -> None:
        names = [ctx.child(part).name for part in parts]
        sizes = list(parts.values())
        self.ops = ctx.ops
        self.weight = Weight(
            tuple(f"{name}.weight" for name in names), tuple((size, in_features) for size in sizes), "matrix"
        )
        self.bias = (
            Weight(tuple(f"{name}.bias" for name in names), tuple((size,) for size in sizes), "bias") if bias else None
        )

    def __call__(self, x_TN: Tensor) -> Tensor:
        """[T, in_features] -> [T, sum of the parts' widths]."""
        return self.ops.linear(x_TN, self.weight.value, None if self.bias is None else self.bias.value)
