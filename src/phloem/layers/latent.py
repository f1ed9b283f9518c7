"""Multi-head latent attention (DeepSeek-V2, 2024): of a token one compressed vector is kept, from which every head's
key and value are made, and beside it one rotated key for all heads.

Legend: T tokens, H heads, L the latent's size, P rotated part, N and D a head's key (but for that part) and value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.memory import Latent
from phloem.kernels.calls import LatentCall
from phloem.layers.linear import Linear
from phloem.layers.norm import AnyNorm, RMSNorm
from phloem.layers.weight import Layer, Projection, Weight, check_divides, cut_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.layers.rope import Rope

_EPS = 1e-6  # of the norms of both latents, whatever config.json says of the others


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of the whole model's layer. `q_rank` 0: queries are projected at once."""

    heads: int
    rank: int  # L
    rope: int  # P
    nope: int  # N
    value: int  # D
    q_rank: int = 0
    bias: bool = False  # of the projections to the latents and of the output's


class LatentAttention(Layer):
    """A mixer. The cache holds latents; keys and values of heads are never kept."""

    def __init__(
        self, ctx: BuildContext, hidden_size: int, sizes: LatentSizes, pool: int, scale: float, rope: Rope | None
    ) -> None:
        tp = ctx.mesh.tp
        check_divides("attention heads", sizes.heads, tp)
        self.ops, self.sizes, self.pool, self.scale, self.rope = ctx.ops, sizes, pool, scale, rope
        self.heads = sizes.heads // tp.size
        self.memory = Latent(sizes.rank, sizes.rope)
        rows, q_head = cut_of(tp, 0), sizes.nope + sizes.rope
        down = {"kv_a_proj_with_mqa": sizes.rank + sizes.rope}
        queries = Projection(sizes.heads * q_head, "", None, rows)
        self.q_norm: RMSNorm | None = None
        if sizes.q_rank:
            self.down = Linear(ctx, hidden_size, {"q_a_proj": sizes.q_rank, **down}, bias=sizes.bias)
            self.q_norm = RMSNorm(ctx.child("q_a_layernorm"), sizes.q_rank, _EPS)
            self.q = Linear(ctx, sizes.q_rank, {"q_b_proj": queries})
        else:
            self.down = Linear(ctx, hidden_size, down, bias=sizes.bias)
            self.q = Linear(ctx, hidden_size, {"q_proj": queries})
        self.norm = RMSNorm(ctx.child("kv_a_layernorm"), sizes.rank, _EPS)
        # Used by head on either side, not as one product: kept as it is, in the activations' type.
        shape = (sizes.heads * (sizes.nope + sizes.value), sizes.rank)
        self.up = Weight((f"{ctx.child('kv_b_proj').name}.weight",), (shape,), "bias")
        self.up.cuts = () if rows is None else ((rows,),)
        self.out = Linear(ctx, sizes.heads * sizes.value, {"o_proj": hidden_size}, bias=sizes.bias, cut=cut_of(tp, 1))

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """Everything before the output projection, of norm(x + residual): ([T, H * D], x + residual)."""
        sizes = self.sizes
        x_TN, total_TN = (x_TN, x_TN) if norm is None else norm.add(x_TN, residual_TN)
        low, _ = self.down(x_TN)
        q = self.q(x_TN)[0] if self.q_norm is None else self.q(self.q_norm(low[:, : sizes.q_rank]))[0]
        kv = low[:, sizes.q_rank :]
        q_THQ = q.unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q_THQ[..., : sizes.nope], q_THQ[..., sizes.nope :]
        turned = kv[:, sizes.rank :].unflatten(-1, (1, sizes.rope))
        if self.rope is not None:
            rotation = self.rope.at(step.positions)
            self.ops.rope_(q_rope, turned, rotation.positions, rotation.cos_sin, rotation.interleaved)
        latent = self.ops.join(self.norm(kv[:, : sizes.rank]), turned.view(-1, sizes.rope))
        out_THD = step.memory.attend_latent(self.pool, q_nope, q_rope, latent, self._call())
        return out_THD.view(-1, self.heads * sizes.value), total_TN

    def _call(self) -> LatentCall:
        up_HML = self.up.value.view(self.heads, -1, self.sizes.rank)
        return LatentCall(up_HML[:, : self.sizes.nope], up_HML[:, self.sizes.nope :].transpose(1, 2), self.scale)
