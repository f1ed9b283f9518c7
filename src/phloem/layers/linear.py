"""Linear layers, fused where several read the same input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from phloem.layers.weight import Layer, projections

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from phloem.distributed.comm import Comm
    from phloem.kernels.calls import Adapters
    from phloem.layers.context import BuildContext
    from phloem.layers.norm import AnyNorm
    from phloem.layers.weight import Cut, Projection


class Additions(Protocol):
    """What adapters add to one layer."""

    def now(self) -> Adapters | None:
        """For the tokens that are computed now; None: none of them has an adapter."""
        ...


class Linear(Layer):
    """One matrix product for one or more projections of the same input.

    Args:
        ctx: its name is the parent's; the checkpoint tensors are `<ctx.name>.<part>.weight` (and `.bias`).
        in_features: width of the input.
        parts: projection name -> output width, in the order in which the outputs are stacked; or a `Projection`, where
            the checkpoint fuses several into one tensor, or ranks share it out.
        bias: whether the projections have a bias.
        cut: which of the inputs this rank has: then all ranks' products are summed, and the bias is added once.
    """

    additions: Additions | None = None  # set from outside, where adapters are served

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
        self.comm: Comm | None = None if cut is None else ctx.comm
        self.weight, self.bias = projections(ctx, in_features, parts, bias=bias, cut=cut)

    def __call__(
        self,
        x_TN: Tensor,
        *,
        norm: AnyNorm | None = None,
        residual: Tensor | None = None,
        gate: str = "",
        add: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, in_features] -> [T, sum of the parts' widths], and the residual stream behind it: see `LinearOp`.

        `norm` and `residual` stand before this layer, `gate` ("silu" or "gelu_tanh", for a gate and an up projection)
        and `add` after it, what adapters add between them. The table fuses of them what it can.
        """
        if self.comm is not None:
            return self._summed(self.comm, x_TN, norm, residual, gate), add
        adapter = None if self.additions is None else self.additions.now()
        before = None if norm is None else norm.before
        if norm is not None and before is None:
            x_TN, total_TN = norm.add(x_TN, residual)
            return self.ops.linear(x_TN, self.weight.value, self._bias, gate=gate, adapter=adapter)[0], total_TN
        return self.ops.linear(
            x_TN, self.weight.value, self._bias, norm=before, residual=residual, gate=gate, add=add, adapter=adapter
        )

    def _summed(self, comm: Comm, x_TN: Tensor, norm: AnyNorm | None, residual: Tensor | None, gate: str) -> Tensor:
        """Over all ranks. Nothing is fused with a sum that is not whole yet."""
        if norm is not None or residual is not None or gate:
            raise ValueError("a linear layer whose inputs ranks share out has nothing before it")
        adapter = None if self.additions is None else self.additions.now()
        if adapter is not None:  # it may scale the bias too
            bias = self._bias if comm.rank == 0 else None
            return comm.all_reduce(self.ops.linear(x_TN, self.weight.value, bias, adapter=adapter)[0])
        total_TM = comm.all_reduce(self.ops.linear(x_TN, self.weight.value, None)[0])
        return total_TM if self._bias is None else total_TM + self._bias.to(total_TM.dtype)

    @property
    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.value
