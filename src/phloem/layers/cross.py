"""Cross-attention: each token attends to what its request has brought beside its tokens, the states of an encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from phloem.core.memory import Cross
from phloem.layers.attention import shared_heads
from phloem.layers.context import Heads
from phloem.layers.linear import Linear
from phloem.layers.weight import Layer, Projection, cut_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.memory import MemorySpec
    from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch
    from phloem.layers.norm import AnyNorm


class CrossAttention(Layer):
    """Queries of tokens over keys and values that `keys_values` made of an encoder's states, once for each request.

    Legend: T tokens, N hidden size, H heads, K kv heads, D head size, S states.
    """

    def __init__(self, ctx: BuildContext, spec: AttentionSpec, hidden_size: int, states: int) -> None:
        own, q_cut, kv_cut = shared_heads(spec, ctx.mesh.tp)
        self.spec, self.states = replace(own, writes=False), states
        inner, kv = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        self.q = Linear(ctx, hidden_size, {"q_proj": Projection(inner, cut=q_cut)}, bias=True)
        parts = {name: Projection(kv, cut=kv_cut) for name in ("k_proj", "v_proj")}
        self.kv = Linear(ctx, hidden_size, parts, bias=True)
        self.out = Linear(ctx, inner, {"out_proj": hidden_size}, bias=True, cut=cut_of(ctx.mesh.tp, 1))

    @property
    def memory(self) -> MemorySpec:
        return Cross(self.spec.kv_heads, self.spec.head_size, self.spec.head_size, self.states)

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """As `Mixer`."""
        q, total_TN = self.q(x_TN, norm=norm, residual=residual_TN)
        q_THD = q.unflatten(-1, (self.spec.heads, -1))
        nothing = q_THD[:, : self.spec.kv_heads]  # not looked at: this layer does not write
        out_THD = step.memory.attend(self.spec, Heads(q_THD, nothing, nothing))
        return out_THD.view(-1, self.spec.heads * self.spec.head_size), x_TN if total_TN is None else total_TN

    def keys_values(self, states_SN: Tensor) -> tuple[Tensor, Tensor]:
        """[S, K, D] each."""
        k, v = self.kv(states_SN)[0].chunk(2, -1)
        return k.unflatten(-1, (self.spec.kv_heads, -1)), v.unflatten(-1, (self.spec.kv_heads, -1))
