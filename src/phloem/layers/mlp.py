"""Feed-forward blocks: gated (Shazeer, 2020), and the two plain matrices of earlier models."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from phloem.core.errors import ModelLoadError
from phloem.layers.linear import Linear
from phloem.layers.weight import Layer, Part, Projection, Weight, check_divides, cut_of

T = TypeVar("T")

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext
    from phloem.layers.norm import AnyNorm


def _picked(activations: dict[str, T], name: str) -> T:
    if not isinstance(name, str) or name not in activations:  # pyright: ignore[reportUnnecessaryIsInstance] - a file's
        raise ModelLoadError(f"unknown activation {name!r} (hidden_act); known: {', '.join(sorted(activations))}")
    return activations[name]


class GatedMLP(Layer):
    """down(act(gate(x)) * up(x)), gate and up fused. `fused`: the tensor in which a checkpoint keeps both, gate first
    or `up_first`; `down_bias`: whether down has a bias, if not as the others."""

    def __init__(
        self,
        ctx: BuildContext,
        hidden_size: int,
        inner_size: int,
        activation: str,
        *,
        bias: bool = False,
        fused: str = "",
        down: str = "down_proj",
        up_first: bool = False,
        down_bias: bool | None = None,
    ) -> None:
        acts = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": ""}
        # "": the exact GELU, which no linear op fuses.
        self.activation, self.ops = _picked(acts, activation), ctx.ops
        tp = ctx.mesh.tp
        check_divides("intermediate_size", inner_size, tp)
        rows, parts = cut_of(tp, 0), (Part(inner_size * up_first), Part(inner_size * (not up_first)))
        pair = {
            name: Projection(inner_size, fused, part if fused else None, rows)
            for name, part in zip(("gate_proj", "up_proj"), parts, strict=True)
        }
        self.gate_up = Linear(ctx, hidden_size, pair, bias=bias)
        last = bias if down_bias is None else down_bias
        self.down = Linear(ctx, inner_size, {down: hidden_size}, bias=last, cut=cut_of(tp, 1))

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The block of norm(x + residual), and x + residual; with `add` perhaps already summed: (sum, None). Without
        norm (and residual) the block of x, and x."""
        hidden, total_TN = self.gate_up(x_TN, norm=norm, residual=residual_TN, gate=self.activation)
        if not self.activation:
            gate, up = hidden.chunk(2, -1)
            hidden = self.ops.mul(self.ops.gelu(gate), up)
        total_TN = x_TN if norm is None else total_TN
        return self.down(hidden, add=total_TN) if add else (self.down(hidden)[0], total_TN)


class Xielu(Layer):
    """An activation whose shape is learned; see `Ops.xielu`."""

    def __init__(self, ctx: BuildContext) -> None:
        self.ops, names = ctx.ops, ("alpha_p", "alpha_n", "beta", "eps")
        self.numbers = [Weight((ctx.child(name).name,), ((1,),), "norm") for name in names]

    def __call__(self, x: Tensor) -> Tensor:
        alpha_p, alpha_n, beta, eps = (weight.value for weight in self.numbers)
        return self.ops.xielu(x, alpha_p, alpha_n, beta, eps)


class PlainMLP(Layer):
    """down(act(up(x))). `names`: of the two projections; `transposed`: stored as [in_features, out_features]."""

    def __init__(
        self,
        ctx: BuildContext,
        hidden_size: int,
        inner_size: int,
        activation: str,
        *,
        bias: bool,
        names: tuple[str, str] = ("up_proj", "down_proj"),
        transposed: bool = False,
    ) -> None:
        ops = ctx.ops
        acts = {
            "gelu": ops.gelu,
            "gelu_new": ops.gelu_tanh,
            "gelu_fast": ops.gelu_tanh,
            "gelu_pytorch_tanh": ops.gelu_tanh,
            "quick_gelu": lambda x: ops.sigmoid_mul(x, ops.scale(x, 1.702)),
            "relu": ops.relu,
            "relu2": ops.relu2,
        }
        self.act = Xielu(ctx.child("act_fn")) if activation == "xielu" else _picked(acts, activation)
        tp, part = ctx.mesh.tp, Part(transposed=True) if transposed else None
        check_divides("intermediate_size", inner_size, tp)
        up = Projection(inner_size, "", part, cut_of(tp, 0))
        self.up = Linear(ctx, hidden_size, {names[0]: up}, bias=bias)
        down = Projection(hidden_size, "", part)
        self.down = Linear(ctx, inner_size, {names[1]: down}, bias=bias, cut=cut_of(tp, 1))

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `GatedMLP`."""
        hidden, total_TN = self.up(x_TN, norm=norm, residual=residual_TN)
        total_TN = x_TN if norm is None else total_TN
        hidden = self.act(hidden)
        return self.down(hidden, add=total_TN) if add else (self.down(hidden)[0], total_TN)
