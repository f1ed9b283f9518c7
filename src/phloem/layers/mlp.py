"""The gated feed-forward block (Shazeer, 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.errors import ModelLoadError
from phloem.layers.linear import Linear
from phloem.layers.weight import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext


class GatedMLP(Layer):
    """down(act(gate(x)) * up(x)), gate and up fused."""

    def __init__(
        self, ctx: BuildContext, hidden_size: int, inner_size: int, activation: str, *, bias: bool = False
    ) -> None:
        acts = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
        if activation not in acts:
            raise ModelLoadError(f"unknown activation {activation!r} (hidden_act); known: {', '.join(sorted(acts))}")
        self.activation = acts[activation]
        self.act = ctx.ops.silu_and_mul if self.activation == "silu" else ctx.ops.gelu_tanh_and_mul
        self.gated_linear = ctx.ops.gated_linear
        self.gate_up = Linear(ctx, hidden_size, {"gate_proj": inner_size, "up_proj": inner_size}, bias=bias)
        self.down = Linear(ctx, inner_size, {"down_proj": hidden_size}, bias=bias)

    def __call__(self, x_TN: Tensor) -> Tensor:
        if self.gated_linear is None:
            return self.down(self.act(self.gate_up(x_TN)))
        bias = None if self.gate_up.bias is None else self.gate_up.bias.value
        return self.down(self.gated_linear(x_TN, self.gate_up.weight.value, bias, self.activation))
