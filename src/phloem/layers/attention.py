"""Self-attention as a model has it: projections, norms and rotation around the step's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.layers.context import Heads
from phloem.layers.linear import Linear
from phloem.layers.norm import RMSNorm
from phloem.layers.weight import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch
    from phloem.layers.rope import Rope


class SelfAttention(Layer):
    """Grouped-query attention with q, k and v in one projection.

    `qk_eps` None: no q and k norm; otherwise each head of q and k is normalised before the rotation, with weights
    shifted by `norm_shift`.
    """

    def __init__(
        self,
        ctx: BuildContext,
        spec: AttentionSpec,
        hidden_size: int,
        rope: Rope,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_eps: float | None = None,
        norm_shift: float = 0.0,
    ) -> None:
        size = spec.head_size
        self.spec = spec
        self.rope = rope
        self.q_end = spec.heads * size
        self.k_end = self.q_end + spec.kv_heads * size
        widths = {"q_proj": self.q_end, "k_proj": spec.kv_heads * size, "v_proj": spec.kv_heads * size}
        self.qkv = Linear(ctx, hidden_size, widths, bias=qkv_bias)
        self.out = Linear(ctx, self.q_end, {"o_proj": hidden_size}, bias=out_bias)
        normed = qk_eps is not None
        self.q_norm = RMSNorm(ctx.child("q_norm"), size, qk_eps, norm_shift) if normed else None
        self.k_norm = RMSNorm(ctx.child("k_norm"), size, qk_eps, norm_shift) if normed else None

    def attend(
        self, norm: RMSNorm, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """Everything before the output projection, of norm(x + residual): ([T, heads * head_size], x + residual)."""
        spec = self.spec
        qkv, total_TN = self.qkv(x_TN, norm=norm, residual=residual_TN)
        assert total_TN is not None  # a layer with a norm gives it
        q_THD = qkv[:, : self.q_end].unflatten(-1, (spec.heads, spec.head_size))
        k_TKD = qkv[:, self.q_end : self.k_end].unflatten(-1, (spec.kv_heads, spec.head_size))
        v_TKD = qkv[:, self.k_end :].unflatten(-1, (spec.kv_heads, spec.head_size))
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight.value, self.k_norm.weight.value
            rotation = self.rope.at(step.positions, *weights, self.q_norm.eps)
        else:
            rotation = self.rope.at(step.positions)
        out_THD = step.memory.attend(spec, Heads(q_THD, k_TKD, v_TKD, None, rotation))
        return out_THD.view(-1, self.q_end), total_TN
