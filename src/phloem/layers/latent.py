"""Multi-head latent attention (DeepSeek-V2, 2024): of a token one compressed vector is kept, from which every head's
key and value are made, and beside it one rotated key for all heads.

Legend: T tokens, H heads, L the latent's size, P rotated part, N and D a head's key (but for that part) and value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.memory import Latent
from phloem.kernels.calls import IndexCall, LatentCall
from phloem.layers.linear import Linear
from phloem.layers.norm import AnyNorm, LayerNorm, RMSNorm
from phloem.layers.weight import Layer, Projection, Weight, check_divides, cut_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.memory import MemorySpec
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
    latent_scale: float = 1.0  # of normalised latents, not of the rotated part


@dataclass(frozen=True)
class IndexSizes:
    """Sizes of an indexer, which chooses the tokens that a layer attends to (DeepSeek-V3.2, 2025)."""

    heads: int
    size: int  # of a head
    count: int  # tokens that are chosen at most


class Indexer(Layer):
    """Cheap heads that all share one key of each token: what they agree on is attended to. Every rank has all of it."""

    row_ops = ("choose_keys", "chosen_latent_attention")

    def __init__(
        self, ctx: BuildContext, hidden_size: int, q_rank: int, sizes: IndexSizes, pool: int, rope: Rope
    ) -> None:
        self.ops, self.sizes, self.pool, self.rope = ctx.ops, sizes, pool, rope
        self.q = Linear(ctx, q_rank, {"wq_b": sizes.heads * sizes.size})
        self.key = Linear(ctx, hidden_size, {"wk": sizes.size})
        self.norm = LayerNorm(ctx.child("k_norm"), sizes.size, _EPS)
        self.weights_of = Linear(ctx, hidden_size, {"weights_proj": sizes.heads})
        self.memory = Latent(sizes.size, 0)
        self.last: Tensor | None = None  # what this step chose, for layers that take it over

    def __call__(self, x_TN: Tensor, q_TR: Tensor, step: ForwardBatch) -> Tensor | None:
        """Positions [T, count] that each token attends to, of hidden states and the latents of queries; None: all."""
        sizes = self.sizes
        q_THD = self.q(q_TR)[0].unflatten(-1, (sizes.heads, sizes.size))
        key_T1D = self.norm(self.key(x_TN)[0]).unflatten(-1, (1, sizes.size))
        rotation = self.rope.at(step.positions)
        self.ops.rope_(q_THD, key_T1D, rotation.positions, rotation.cos_sin, rotation.interleaved)
        weights_TH = self.ops.scale(self.weights_of(x_TN)[0], (sizes.heads * sizes.size) ** -0.5)
        call = IndexCall(q_THD, key_T1D.view(-1, sizes.size), weights_TH, sizes.count)
        self.last = step.memory.choose(self.pool, call)
        return self.last


class LatentAttention(Layer):
    """A mixer. The cache holds latents; keys and values of heads are never kept. `indexer` chooses what is attended to;
    `lender` is that of an earlier layer, whose choice this one takes over."""

    row_ops = ("latent_attention",)
    indexer: Indexer | None = None
    lender: Indexer | None = None
    growth: Tensor | None = None  # a factor on queries by position, float32 [positions, 1]

    def __init__(
        self, ctx: BuildContext, hidden_size: int, sizes: LatentSizes, pool: int, scale: float, rope: Rope | None
    ) -> None:
        tp = ctx.mesh.tp
        check_divides("attention heads", sizes.heads, tp)
        self.ops, self.sizes, self.pool, self.scale, self.rope = ctx.ops, sizes, pool, scale, rope
        self.heads = sizes.heads // tp.size
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
        # Used by head on either side, not as one product: kept as it is, in the model's type.
        shape = (sizes.heads * (sizes.nope + sizes.value), sizes.rank)
        self.up = Weight((f"{ctx.child('kv_b_proj').name}.weight",), (shape,), "bias")
        self.up.in_own_type = True
        self.up.cuts = () if rows is None else ((rows,),)
        self.out = Linear(ctx, sizes.heads * sizes.value, {"o_proj": hidden_size}, bias=sizes.bias, cut=cut_of(tp, 1))

    @property
    def memory(self) -> tuple[MemorySpec, ...]:
        """A latent of every token, and its index key."""
        own = Latent(self.sizes.rank, self.sizes.rope)
        return (own,) if self.indexer is None else (own, self.indexer.memory)

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """Everything before the output projection, of norm(x + residual): ([T, H * D], x + residual)."""
        sizes = self.sizes
        x_TN, total_TN = (x_TN, x_TN) if norm is None else norm.add(x_TN, residual_TN)
        low, _ = self.down(x_TN)
        q_low = x_TN if self.q_norm is None else self.q_norm(low[:, : sizes.q_rank])
        chosen = None if self.lender is None else self.lender.last
        if self.indexer is not None:
            chosen = self.indexer(x_TN, q_low, step)
        q = self.q(q_low)[0]
        kv = low[:, sizes.q_rank :]
        if self.growth is not None:
            q = self.ops.scale_rows(q, self.ops.select_rows(self.growth, step.positions).view(-1))
        q_THQ = q.unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q_THQ[..., : sizes.nope], q_THQ[..., sizes.nope :]
        turned = kv[:, sizes.rank :].unflatten(-1, (1, sizes.rope))
        if self.rope is not None:
            rotation = self.rope.at(step.positions)
            self.ops.rope_(q_rope, turned, rotation.positions, rotation.cos_sin, rotation.interleaved)
        compressed = self.norm(kv[:, : sizes.rank])
        if sizes.latent_scale != 1.0:
            compressed = self.ops.scale(compressed, sizes.latent_scale)
        latent = self.ops.join(compressed, turned.view(-1, sizes.rope))
        out_THD = step.memory.attend_latent(self.pool, q_nope, q_rope, latent, self._call(), chosen)
        return out_THD.view(-1, self.heads * sizes.value), total_TN

    def _call(self) -> LatentCall:
        up_HML = self.up.value.view(self.heads, -1, self.sizes.rank)
        return LatentCall(up_HML[:, : self.sizes.nope], up_HML[:, self.sizes.nope :].transpose(1, 2), self.scale)
