"""Kimi Delta Attention (Kimi Linear, 2025): a gated delta net that forgets each channel of a key at its own pace.

Legend: T packed tokens, C channels, H heads, S a head's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from phloem.core.memory import State
from phloem.layers.linear import Linear
from phloem.layers.recurrent import FLOAT, Convolution, delta, taken, vector
from phloem.layers.weight import Layer, Projection, Weight, check_divides, cut_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.memory import MemorySpec
    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.layers.norm import AnyNorm

PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class KimiDeltaSizes:
    """Sizes of the whole model's layer: as many heads of q and k as of v, all of one size."""

    heads: int
    size: int
    taps: int
    eps: float


class KimiDelta(Layer):
    """A mixer: norm(y) * sigmoid(g) for each head; the decay's and the output's gates go through `size` features."""

    row_ops = ("gated_delta",)

    def __init__(self, ctx: BuildContext, hidden_size: int, pool: int, sizes: KimiDeltaSizes) -> None:
        self.ops, self.pool, self.sizes = ctx.ops, pool, sizes
        tp, width = ctx.mesh.tp, sizes.heads * sizes.size
        check_divides("linear_num_heads", sizes.heads, tp)
        rows = cut_of(tp, 0)
        parts = {f"{part}_proj": Projection(width, cut=rows) for part in PARTS}
        parts["b_proj"] = Projection(sizes.heads, cut=rows)
        # Every rank has the narrow half of both gates.
        parts |= {name: Projection(sizes.size) for name in ("f_a_proj", "g_a_proj")}
        self.inputs = Linear(ctx, hidden_size, parts)
        self.forget = Linear(ctx, sizes.size, {"f_b_proj": Projection(width, cut=rows)})
        self.gate = Linear(ctx, sizes.size, {"g_b_proj": Projection(width, cut=rows)})
        self.conv = Convolution(ctx, [width] * 3, sizes.taps, bias=False, silu=True)
        # Three tensors, one for each of q, k and v.
        self.conv.weight.names = tuple(f"{ctx.child(f'{part}_conv1d').name}.weight" for part in PARTS)
        self.conv.weight.parts = ()
        self.dt_bias, self.decay = vector(ctx, "dt_bias", [width]), vector(ctx, "A_log", [sizes.heads])
        self.norm = Weight((f"{ctx.child('o_norm').name}.weight",), ((sizes.size,),), "norm")
        self.out = Linear(ctx, width, {"o_proj": hidden_size}, cut=cut_of(tp, 1))
        self.heads = sizes.heads // tp.size
        # x / sqrt(sum x^2 + 1e-6), as a root mean square norm.
        self.unit = torch.full((sizes.size,), sizes.size**-0.5, device=ctx.device)

    @property
    def memory(self) -> MemorySpec:
        size = self.sizes.size
        return State((self.conv.shape, ((self.heads, size, size), FLOAT)))

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """As `Mixer`."""
        size, width, state = self.sizes.size, self.heads * self.sizes.size, step.memory.state(self.pool)
        found, total_TN = taken(self.inputs, norm, x_TN, residual_TN)
        mixed_TC, b_TH, low_TS, gate_TS = found.split([3 * width, self.heads, size, size], -1)
        mixed_TC = state.run(self.conv.over, mixed_TC)
        q_THS, k_THS, v_THS = (part.unflatten(-1, (self.heads, size)) for part in mixed_TC.split(width, -1))
        q_THS, k_THS = (self.ops.rms_norm(x_THS, self.unit, 1e-6 / size) for x_THS in (q_THS, k_THS))
        a_THS = self.forget(low_TS)[0].unflatten(-1, (self.heads, size))
        bias_HS, log_H1 = self.dt_bias.value.view(self.heads, size), self.decay.value.view(-1, 1)
        decay_THS, beta_TH = self.ops.delta_gates(a_THS, b_TH, bias_HS, log_H1)
        y_THS = state.run(partial(delta, self.ops), v_THS, q_THS, k_THS, decay_THS, beta_TH)
        y_TC = self.ops.rms_norm(y_THS, self.norm.value, self.sizes.eps).flatten(1)
        return self.ops.sigmoid_mul(y_TC, self.gate(gate_TS)[0]), total_TN
