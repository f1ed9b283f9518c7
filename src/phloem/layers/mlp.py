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
        acts = {
            "silu": ctx.ops.silu_and_mul,
            "swish": ctx.ops.silu_and_mul,
            "gelu_pytorch_tanh": ctx.ops.gelu_tanh_and_mul,
        }
        if activation not in acts:
            raise ModelLoadError(f"unknown activation {activation!r} (hidden_act); known: {', '.join(sorted(acts))}")
        self.act = acts[activation]
        self.gate_up = Linear(ctx, hidden_size, {"gate_proj": inner_size, "up_proj": inner_size}, bias=bias)
        self.down = Linear(ctx, inner_size, {"down_proj": hidden_size}, bias=bias)

    def __call__(self, x_TN: Tensor) -> Tensor:
        return self.down(self.act(self.gate_up(x_TN)))
