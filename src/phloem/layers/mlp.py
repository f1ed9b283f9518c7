"""The gated feed-forward block (Shazeer, 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.errors import ModelLoadError
from phloem.layers.linear import Linear
from phloem.layers.weight import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext
    from phloem.layers.norm import RMSNorm


class GatedMLP(Layer):
    """down(act(gate(x)) * up(x)), gate and up fused."""

    def __init__(
        self, ctx: BuildContext, hidden_size: int, inner_size: int, activation: str, *, bias: bool = False
    ) -> None:
        acts = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
        if activation not in acts:
            raise ModelLoadError(f"unknown activation {activation!r} (hidden_act); known: {', '.join(sorted(acts))}")
        self.activation = acts[activation]
        self.gate_up = Linear(ctx, hidden_size, {"gate_proj": inner_size, "up_proj": inner_size}, bias=bias)
        self.down = Linear(ctx, inner_size, {"down_proj": hidden_size}, bias=bias)

    def __call__(
        self, norm: RMSNorm, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The block of norm(x + residual), and x + residual; with `add` perhaps already summed: (sum, None)."""
        hidden, total_TN = self.gate_up(x_TN, norm=norm, residual=residual_TN, gate=self.activation)
        return self.down(hidden, add=total_TN) if add else (self.down(hidden)[0], total_TN)
