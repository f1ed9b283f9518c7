"""Self-attention as a model has it: projections, norms and rotation around the step's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from phloem.core.errors import ModelLoadError
from phloem.core.memory import Paged
from phloem.distributed.mesh import some_sizes
from phloem.layers.context import Heads
from phloem.layers.linear import Linear
from phloem.layers.norm import AnyNorm, RMSNorm
from phloem.layers.weight import Cut, Layer, Part, Projection, Weight, cut_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.memory import MemorySpec
    from phloem.distributed.mesh import Axis
    from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch, Relative
    from phloem.layers.rope import Rope

# head: of each head before the rotation, fused with it where a table can; after: of each head, behind the rotation;
# unit: as that, without weights; whole: of the whole projection before it is split into heads.
QKNorm = Literal["", "head", "after", "unit", "whole"]


@dataclass(frozen=True)
class QGrowth:
    """A factor on the query at position p that grows with it: 1 + beta ln(1 + floor((p + first) / length))."""

    beta: float
    length: int
    first: int = 0

    def table(self, positions: int) -> torch.Tensor:
        """The factor of each position, float32 [positions, 1]."""
        steps = torch.floor((torch.arange(positions, dtype=torch.float32) + self.first) / self.length)
        return (1 + self.beta * torch.log1p(steps))[:, None]


@dataclass(frozen=True)
class AttentionOptions:
    """How families differ in what stands around attention."""

    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm = ""
    eps: float = 1e-6  # of the norms
    norm_shift: float = 0.0
    q_norm: str = "q_norm"  # the norms' names
    k_norm: str = "k_norm"
    v_norm: bool = False  # each head of v is normalised, without a weight
    k_as_v: bool = False  # v is what k_proj gives, before the norm of k: there is no v_proj
    gate: bool = False  # q_proj gives a gate beside each head of q; the output is multiplied by its sigmoid
    sinks: str = ""  # the name of the weight with one logit per head
    fused: str = ""  # the tensor that a checkpoint keeps q, k and v in, in this order
    grouped: bool = False  # in that tensor each kv head's queries, key and value lie together
    transposed: bool = False  # matrices are stored as [in_features, out_features]
    q_growth: QGrowth | None = None
    value_scale: float = 1.0
    clip: float = 0.0  # what the projections give is cut to so much on either side of 0; 0: it is not
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    o_proj: str = "o_proj"


def shared_heads(spec: AttentionSpec, tp: Axis) -> tuple[AttentionSpec, Cut | None, Cut | None]:
    """What one rank attends with, and its share of the rows of q and of k and v.

    Fewer kv heads than ranks: several ranks keep the same one. Raises ModelLoadError with the sizes that would do.
    """
    heads, kv_heads = spec.heads, spec.kv_heads

    def fits(size: int) -> bool:
        return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)

    if not fits(tp.size):
        valid = some_sizes(heads, heads, fits)
        raise ModelLoadError(
            f"tp_size {tp.size}: {heads} attention heads and {kv_heads} kv heads cannot be shared out; valid: {valid}"
        )
    if tp.size == 1:
        return spec, None, None
    kv = Cut(0, tp.rank * kv_heads // tp.size, kv_heads) if tp.size > kv_heads else cut_of(tp, 0)
    own = replace(spec, heads=heads // tp.size, kv_heads=max(1, kv_heads // tp.size))
    return own, cut_of(tp, 0), kv


class SelfAttention(Layer):
    """Grouped-query attention with q, k and v in one projection. `rope` None: no rotation."""

    relative: Relative | None = None  # its model's, of encoders whose attention weighs distances

    def __init__(
        self, ctx: BuildContext, spec: AttentionSpec, hidden_size: int, rope: Rope | None, options: AttentionOptions
    ) -> None:
        self.ops, self.rope, self.options = ctx.ops, rope, options
        self.spec, q_cut, kv_cut = shared_heads(spec, ctx.mesh.tp)
        q_head = spec.head_size * (2 if options.gate else 1)
        self.q_end = self.spec.heads * q_head
        self.k_end = self.q_end + self.spec.kv_heads * spec.head_size
        count = 3 if spec.writes and not options.k_as_v else 2 if spec.writes else 1  # of q, k and v
        sizes = (spec.heads * q_head, spec.kv_heads * spec.head_size, spec.kv_heads * spec.values)
        names = (options.q_proj, options.k_proj, options.v_proj)
        parts: dict[str, int | Projection] = {}
        for place, (name, size) in enumerate(zip(names[:count], sizes, strict=False)):
            part = Part(sum(sizes[:place]), transposed=options.transposed) if options.fused else None
            parts[name] = Projection(size, options.fused, part, q_cut if place == 0 else kv_cut)
        if options.grouped:
            parts = _grouped(spec, options.fused, q_cut, kv_cut)
        self.qkv = Linear(ctx, hidden_size, parts, bias=options.qkv_bias)
        inner = spec.heads * spec.values
        out = Projection(hidden_size, "", Part(transposed=True) if options.transposed else None)
        cut = cut_of(ctx.mesh.tp, 1)
        self.out = Linear(ctx, inner, {options.o_proj: out}, bias=options.out_bias, cut=cut)
        self.q_norm = self.k_norm = None
        if options.qk_norm and options.qk_norm != "unit":
            self.q_norm = self._norm(ctx, options.q_norm, sizes[0], q_cut)
            # A layer that reads another's keys has normalised none: what stands here is not looked at.
            self.k_norm = self._norm(ctx, options.k_norm, sizes[1], kv_cut) if spec.writes else self.q_norm
        self.ones = torch.ones(spec.values, device=ctx.device) if options.v_norm or options.qk_norm == "unit" else None
        self.growth: Tensor | None = None  # the maker's, who knows how many positions there are
        self.sinks = _vector(ctx, options.sinks, spec.heads, q_cut) if options.sinks else None

    def _norm(self, ctx: BuildContext, name: str, whole: int, cut: Cut | None) -> RMSNorm:
        options = self.options
        size = whole if options.qk_norm == "whole" else self.spec.head_size
        norm = RMSNorm(ctx.child(name), size, options.eps, options.norm_shift)
        if options.qk_norm == "whole" and cut is not None:
            norm.weight.cuts = ((cut,),)
            norm.comm = ctx.comm
        return norm

    @property
    def memory(self) -> MemorySpec | None:
        """Keys and values of every token; None where another layer writes them."""
        spec = self.spec
        return Paged(spec.kv_heads, spec.head_size, spec.values, spec.window) if spec.writes else None

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """Everything before the output projection, of norm(x + residual), or without norm of the sum: ([T, heads *
        value size], x + residual)."""
        spec, options = self.spec, self.options
        if norm is None:
            total_TN = x_TN if residual_TN is None else self.ops.add(x_TN, residual_TN)
            qkv, _ = self.qkv(total_TN)
        else:
            qkv, total_TN = self.qkv(x_TN, norm=norm, residual=residual_TN)
            assert total_TN is not None  # a layer with a norm gives it
        heads, gate_THD = self._heads(qkv, step)
        if options.qk_norm in ("after", "unit"):
            self._turn_then_norm(heads)
        heads.distances, heads.relative = step.distances, self.relative
        out_THD = step.memory.attend(spec, heads)
        if options.value_scale != 1.0:  # of what is attended to, in the end: the same, and none is read twice
            out_THD = self.ops.scale(out_THD, options.value_scale)
        if gate_THD is not None:
            out_THD = self.ops.sigmoid_mul(out_THD, gate_THD)
        return out_THD.view(-1, spec.heads * spec.values), total_TN

    def _heads(self, qkv: Tensor, step: ForwardBatch) -> tuple[Heads, Tensor | None]:
        """q, k and v by head, with what is still to be done to q and k; and the gate of the output."""
        spec, options = self.spec, self.options
        if options.clip:
            qkv = self.ops.clip(qkv, options.clip)
        q, k, v = qkv[:, : self.q_end], qkv[:, self.q_end : self.k_end], qkv[:, self.k_end :]
        fused = self.q_norm is not None and self.k_norm is not None and options.qk_norm == "head"
        if self.q_norm is not None and self.k_norm is not None and options.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q_THD, gate_THD = q.unflatten(-1, (spec.heads, -1)), None
        if options.gate:
            q_THD, gate_THD = q_THD[..., : spec.head_size], q_THD[..., spec.head_size :]
        if self.growth is not None:
            factor_T1 = self.ops.select_rows(self.growth, step.positions)
            q_THD = self.ops.scale_rows(q_THD, factor_T1.view(-1))
        if spec.writes:
            k_TKD = k.unflatten(-1, (spec.kv_heads, -1))
            v_TKD = k_TKD if options.k_as_v else v.unflatten(-1, (spec.kv_heads, -1))
            if options.v_norm and self.ones is not None:
                v_TKD = self.ops.rms_norm(v_TKD, self.ones, options.eps)
        else:
            k_TKD = v_TKD = q_THD[:, :0]
        sinks = None if self.sinks is None else self.sinks.value
        if fused and self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight.value, self.k_norm.weight.value
            if self.rope is not None:
                rotation = self.rope.at(step.positions, *weights, self.q_norm.eps)
                return Heads(q_THD, k_TKD, v_TKD, sinks, rotation), gate_THD
            return Heads(self.q_norm(q_THD), self.k_norm(k_TKD), v_TKD, sinks, None), gate_THD
        rotation = None if self.rope is None else self.rope.at(step.positions)
        return Heads(q_THD, k_TKD, v_TKD, sinks, rotation), gate_THD

    def _turn_then_norm(self, heads: Heads) -> None:
        """Rotation and norm as ops of their own, where the norm stands behind the rotation."""
        rotation = heads.rotation
        if rotation is not None:
            self.ops.rope_(heads.q, heads.k, rotation.positions, rotation.cos_sin, rotation.interleaved)
            heads.rotation = None
        if self.options.qk_norm == "unit" and self.ones is not None:
            eps = self.options.eps
            heads.q, heads.k = (self.ops.rms_norm(x, self.ones, eps) for x in (heads.q, heads.k))
        elif self.q_norm is not None and self.k_norm is not None:
            heads.q, heads.k = self.q_norm(heads.q), self.k_norm(heads.k)


def _grouped(spec: AttentionSpec, name: str, q_cut: Cut | None, kv_cut: Cut | None) -> dict[str, int | Projection]:
    """A rank's heads out of a tensor that keeps, of one kv head after another, its queries, its key and its value."""
    share, size = spec.heads // spec.kv_heads, spec.head_size
    q = range(*(q_cut.span(spec.heads) if q_cut else (0, spec.heads)))
    kv = range(*(kv_cut.span(spec.kv_heads) if kv_cut else (0, spec.kv_heads)))
    rows = [(h // share) * (share + 2) + h % share for h in q]
    rows += [h * (share + 2) + share + value for value in (0, 1) for h in kv]
    total = (spec.heads + 2 * spec.kv_heads) * size
    return {f"{name}.{row}": Projection(size, name, Part(row * size, total=total)) for row in rows}


def _vector(ctx: BuildContext, name: str, size: int, cut: Cut | None) -> Weight:
    """One float32 number per head."""
    slot = Weight((ctx.child(name).name,), ((size,),), "norm")
    slot.cuts = () if cut is None else ((cut,),)
    return slot
