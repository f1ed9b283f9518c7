"""Linear layers, fused where several read the same input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.layers.weight import Layer, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels.calls import Adapters
    from phloem.layers.context import BuildContext
    from phloem.layers.norm import RMSNorm


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

    def __call__(
        self,
        x_TN: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        gate: str = "",
        add: Tensor | None = None,
        adapter: Adapters | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, in_features] -> [T, sum of the parts' widths], and the residual stream behind it: see `LinearOp`.

        `norm` and `residual` stand before this layer, `gate` ("silu" or "gelu_tanh", for a gate and an up projection),
        `adapter` and `add` after it. The table fuses of them what it can.
        """
        before = None if norm is None else norm.before
        return self.ops.linear(
            x_TN, self.weight.value, self._bias, norm=before, residual=residual, gate=gate, add=add, adapter=adapter
        )

    @property
    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.value
