"""The sparse feed-forward block: a router picks a few experts for each token (Shazeer et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.errors import ModelLoadError
from phloem.layers.linear import Linear
from phloem.layers.weight import Layer, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext
    from phloem.layers.norm import RMSNorm


@dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of a sparse block. `renormalise`: a token's chosen weights are scaled to sum to 1."""

    count: int
    per_token: int
    inner_size: int
    renormalise: bool


class SparseMLP(Layer):
    """Experts are gated MLPs with SiLU; checkpoint names are `<ctx.name>.gate` and `<ctx.name>.experts.<n>.*`."""

    def __init__(self, ctx: BuildContext, hidden_size: int, config: ExpertsConfig, activation: str) -> None:
        if activation not in ("silu", "swish"):
            raise ModelLoadError(f"experts with activation {activation!r} (hidden_act); known: silu")
        if not 0 < config.per_token <= config.count:
            raise ModelLoadError(f"num_experts_per_tok: {config.per_token} of {config.count} experts")
        self.ops = ctx.ops
        self.config = config
        self.router = Linear(ctx, hidden_size, {"gate": config.count})
        inner, experts = config.inner_size, [ctx.child("experts").child(n) for n in range(config.count)]
        gate_up = [expert.child(part).name for expert in experts for part in ("gate_proj", "up_proj")]
        self.gate_up = _stack(gate_up, (inner, hidden_size), config.count)
        self.down = _stack([expert.child("down_proj").name for expert in experts], (hidden_size, inner), config.count)

    def __call__(
        self, norm: RMSNorm, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `GatedMLP`, and never summed: router and experts both read the normed input, the sum is not theirs."""
        del add
        config = self.config
        x_TN, residual_TN = norm.add(x_TN, residual_TN)
        out = self.ops.moe(
            x_TN, self.router(x_TN)[0], self.gate_up.value, self.down.value, config.per_token, config.renormalise
        )
        return out, residual_TN


def _stack(names: list[str], shape: tuple[int, int], experts: int) -> Weight:
    return Weight(tuple(f"{name}.weight" for name in names), (shape,) * len(names), "matrix", experts=experts)
