"""Mixers that keep a state of fixed size in place of keys and values: short convolutions, Mamba 1 and 2, delta nets.

Legend: T packed tokens, R rows of the step, C channels, W taps, H heads, D head size, S state size, G groups, N hidden
size. A row's states are read from where its last step left them and written elsewhere, so that a step can be undone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from phloem.core.errors import ModelLoadError
from phloem.core.memory import State
from phloem.kernels.calls import PooledStates
from phloem.layers.linear import Linear
from phloem.layers.norm import AnyNorm, RMSNorm
from phloem.layers.weight import Layer, Part, Projection, Weight, check_divides, cut_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from phloem.core.memory import MemorySpec
    from phloem.kernels.ops import Ops
    from phloem.layers.context import BuildContext, ForwardBatch, StateStep

FLOAT = "float32"  # a state adds up over a whole text


def before(ops: Ops, step: StateStep, number: int) -> Tensor | PooledStates:
    """What one of a layer's states was before the step, [R, ...], zeros for rows that begin; or where it lies, for a
    table whose ops read and write it there."""
    if ops.pooled_states:
        return PooledStates(step.tensors[number], step.reads, step.writes, step.fresh)
    return ops.read_states(step.tensors[number], step.reads, step.fresh)


def keep(ops: Ops, step: StateStep, number: int, after: Tensor | None) -> None:
    """Write that state behind the step, if the op has not."""
    if after is not None:
        ops.write_states(step.tensors[number], step.writes, after)


def pieces(ctx: BuildContext, name: str, sizes: Mapping[str, int]) -> dict[str, Projection]:
    """Projections that lie one after another in the tensor `name`, each shared out by its rows."""
    cut, found, start = cut_of(ctx.mesh.tp, 0), dict[str, Projection](), 0
    for key, size in sizes.items():
        found[f"{name}.{key}"] = Projection(size, name, Part(start), cut)
        start += size
    return found


def vector(ctx: BuildContext, name: str, sizes: list[int], *behind: int) -> Weight:
    """A float32 slot for `sizes` numbers (or rows of shape `behind`) that lie one after another, each shared out."""
    cut = cut_of(ctx.mesh.tp, 0)
    slot = Weight((ctx.child(name).name,) * len(sizes), tuple((size, *behind) for size in sizes), "norm")
    if len(sizes) > 1:
        slot.parts = tuple(Part(sum(sizes[:place])) for place in range(len(sizes)))
    slot.cuts = () if cut is None else ((cut,),) * len(sizes)
    return slot


class Convolution(Layer):
    """A depthwise causal convolution over `sizes` channels, one after another, with `taps` tokens. `scales`: factors on
    the inputs of each."""

    row_ops = ("causal_conv",)

    def __init__(
        self, ctx: BuildContext, sizes: list[int], taps: int, *, bias: bool, silu: bool, scales: Sequence[float] = ()
    ) -> None:
        self.ops, self.silu, self.taps = ctx.ops, silu, taps
        self.weight = vector(ctx, "weight", sizes, 1, taps)
        self.bias = vector(ctx, "bias", sizes) if bias else None
        own = [size // ctx.mesh.tp.size for size in sizes]
        self.channels, self.scale_C = sum(own), None
        if any(scale != 1.0 for scale in scales):
            self.scale_C = torch.tensor(scales).repeat_interleave(torch.tensor(own)).to(ctx.device)

    @property
    def shape(self) -> tuple[tuple[int, ...], str]:
        """Of its state: the inputs of the last tokens."""
        return (self.channels, self.taps - 1), FLOAT

    def __call__(self, x_TC: Tensor, state: Tensor | PooledStates, query_start: Tensor) -> tuple[Tensor, Tensor | None]:
        bias, weight_CW = None if self.bias is None else self.bias.value, self.weight.value.squeeze(1)
        if self.scale_C is not None:
            weight_CW = self.ops.scale_rows(weight_CW, self.scale_C)
        return self.ops.causal_conv(x_TC, weight_CW, bias, state, query_start, self.silu)

    def over(self, step: StateStep, x_TC: Tensor) -> Tensor:
        """The same over the first of a layer's states, which goes on with the step (`States.run`)."""
        y_TC, last = self(x_TC, before(self.ops, step, 0), step.query_start)
        keep(self.ops, step, 0, last)
        return y_TC


def taken(linear: Linear, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None) -> tuple[Tensor, Tensor]:
    """(linear(norm(x + residual)), x + residual)."""
    out, total_TN = linear(x_TN, norm=norm, residual=residual_TN)
    return out, x_TN if total_TN is None else total_TN


@dataclass(frozen=True)
class ConvSizes:
    """Sizes of a short convolution."""

    taps: int
    bias: bool = False


class ShortConv(Layer):
    """LFM2's mixer: in_proj gives b, c and x; c * conv(b * x)."""

    def __init__(self, ctx: BuildContext, hidden_size: int, pool: int, sizes: ConvSizes) -> None:
        self.ops, self.pool = ctx.ops, pool
        taps, bias = sizes.taps, sizes.bias
        check_divides("hidden_size", hidden_size, ctx.mesh.tp)
        parts = pieces(ctx, "in_proj", {"b": hidden_size, "c": hidden_size, "x": hidden_size})
        self.inputs = Linear(ctx, hidden_size, parts, bias=bias)
        self.conv = Convolution(ctx.child("conv"), [hidden_size], taps, bias=bias, silu=False)
        self.out = Linear(ctx, hidden_size, {"out_proj": hidden_size}, bias=bias, cut=cut_of(ctx.mesh.tp, 1))

    @property
    def memory(self) -> MemorySpec:
        return State((self.conv.shape,))

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """As `Mixer`."""
        found, total_TN = taken(self.inputs, norm, x_TN, residual_TN)
        b_TC, c_TC, x_TC = found.chunk(3, -1)
        y_TC = step.memory.state(self.pool).run(self.conv.over, self.ops.mul(b_TC, x_TC))
        return self.ops.mul(c_TC, y_TC), total_TN


@dataclass(frozen=True)
class MambaSizes:
    """Sizes of the whole model's Mamba 2 layer."""

    heads: int
    head_size: int
    groups: int  # of heads that share B and C, and whose outputs are normalised together
    state: int
    taps: int
    eps: float
    bias: bool = False  # of the projections
    conv_bias: bool = True
    lowest: float = 0.0  # steps are at least this long
    highest: float = float("inf")
    out_bias: bool | None = None  # of the last projection; None: as `bias`
    norm: Literal["gated", "first", "none"] = "gated"  # norm(y * silu(z)), norm(y) * silu(z), or y * silu(z)
    scales: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)  # of what in_proj gives: z, x, B, C and dt


class Mamba2(Layer):
    """State space duality (Dao and Gu, 2024): in_proj gives z, x, B, C and dt."""

    row_ops = ("mamba2_scan",)

    def __init__(self, ctx: BuildContext, hidden_size: int, pool: int, sizes: MambaSizes) -> None:
        self.ops, self.pool, self.sizes = ctx.ops, pool, sizes
        tp, inner, shared = ctx.mesh.tp, sizes.heads * sizes.head_size, sizes.groups * sizes.state
        if sizes.heads % sizes.groups:
            raise ModelLoadError(f"Mamba 2: {sizes.groups} groups do not divide {sizes.heads} heads")
        check_divides("groups of heads", sizes.groups, tp)
        rows = {"z": inner, "x": inner, "b": shared, "c": shared, "dt": sizes.heads}
        self.inputs = Linear(ctx, hidden_size, pieces(ctx, "in_proj", rows), bias=sizes.bias)
        mixed = [inner, shared, shared]
        scales = sizes.scales[1:4]
        self.conv = Convolution(ctx.child("conv1d"), mixed, sizes.taps, bias=sizes.conv_bias, silu=True, scales=scales)
        self.dt_bias, self.decay, self.skip = (vector(ctx, name, [sizes.heads]) for name in ("dt_bias", "A_log", "D"))
        self.norm = None if sizes.norm == "none" else vector(ctx.child("norm"), "weight", [inner])
        bias = sizes.bias if sizes.out_bias is None else sizes.out_bias
        self.out = Linear(ctx, inner, {"out_proj": hidden_size}, bias=bias, cut=cut_of(tp, 1))
        self.heads, self.groups = sizes.heads // tp.size, sizes.groups // tp.size
        self.inner, self.shared, self.group = inner // tp.size, shared // tp.size, inner // sizes.groups

    @property
    def memory(self) -> MemorySpec:
        sizes = self.sizes
        return State((self.conv.shape, ((self.heads, sizes.head_size, sizes.state), FLOAT)))

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """As `Mixer`."""
        sizes, state = self.sizes, step.memory.state(self.pool)
        found, total_TN = taken(self.inputs, norm, x_TN, residual_TN)
        z_TC, mixed_TC, dt_TH = found.split([self.inner, self.inner + 2 * self.shared, self.heads], -1)
        z_TC, dt_TH = self._scaled(z_TC, sizes.scales[0]), self._scaled(dt_TH, sizes.scales[4])
        mixed_TC = state.run(self.conv.over, mixed_TC)
        x_TC, b_TC, c_TC = mixed_TC.split([self.inner, self.shared, self.shared], -1)
        dt_TH = self.ops.step_sizes(dt_TH, self.dt_bias.value, sizes.lowest, sizes.highest)
        x_THD = x_TC.unflatten(-1, (self.heads, sizes.head_size))
        b_TGS, c_TGS = (shared.unflatten(-1, (self.groups, sizes.state)) for shared in (b_TC, c_TC))
        y_TC = state.run(self._scan, x_THD, dt_TH, b_TGS, c_TGS).flatten(1)
        if self.norm is None:
            return self.ops.silu_and_mul(self.ops.join(z_TC, y_TC)), total_TN
        first = sizes.norm == "first"
        return self.ops.gated_rms_norm(y_TC, z_TC, self.norm.value, sizes.eps, self.group, first), total_TN

    def _scan(self, state: StateStep, x_THD: Tensor, dt_TH: Tensor, b_TGS: Tensor, c_TGS: Tensor) -> Tensor:
        kept, decay_H = before(self.ops, state, 1), self.ops.decays(self.decay.value)
        rest = decay_H, b_TGS, c_TGS, self.skip.value, kept, state.query_start
        y_THD, kept = self.ops.mamba2_scan(x_THD, dt_TH, *rest)
        keep(self.ops, state, 1, kept)
        return y_THD

    def _scaled(self, x: Tensor, factor: float) -> Tensor:
        return x if factor == 1.0 else self.ops.scale(x, factor)


@dataclass(frozen=True)
class SelectiveSizes:
    """Sizes of the whole model's Mamba 1 layer."""

    inner: int
    state: int
    rank: int  # of what the steps are made of
    taps: int
    bias: bool = False  # of the projections
    conv_bias: bool = True
    norm: Literal["", "weightless", "weights"] = ""  # of what the steps are made of, of B and of C
    eps: float = 1e-6  # of these norms


class Mamba1(Layer):
    """A selective state space (Gu and Dao, 2023): in_proj gives x and z; x gives dt, B and C; y * silu(z)."""

    row_ops = ("selective_scan",)

    def __init__(self, ctx: BuildContext, hidden_size: int, pool: int, sizes: SelectiveSizes) -> None:
        self.ops, self.pool, self.sizes = ctx.ops, pool, sizes
        tp, inner = ctx.mesh.tp, sizes.inner
        check_divides("the inner size", inner, tp)
        self.inputs = Linear(ctx, hidden_size, pieces(ctx, "in_proj", {"x": inner, "z": inner}), bias=sizes.bias)
        self.conv = Convolution(ctx.child("conv1d"), [inner], sizes.taps, bias=sizes.conv_bias, silu=True)
        self.widths = {"dt": sizes.rank, "b": sizes.state, "c": sizes.state}
        self.low = Linear(ctx, inner, {"x_proj": sum(self.widths.values())}, cut=cut_of(tp, 1))
        self.steps = Linear(ctx, sizes.rank, {"dt_proj": Projection(inner, cut=cut_of(tp, 0))})
        self.dt_bias, self.skip = vector(ctx.child("dt_proj"), "bias", [inner]), vector(ctx, "D", [inner])
        self.decay = vector(ctx, "A_log", [inner], sizes.state)
        self.norms: list[RMSNorm] = []
        if sizes.norm == "weights":
            self.norms = [RMSNorm(ctx.child(f"{name}_layernorm"), n, sizes.eps) for name, n in self.widths.items()]
        self.ones = [torch.ones(n, device=ctx.device) for n in self.widths.values()] if sizes.norm else []
        self.out = Linear(ctx, inner, {"out_proj": hidden_size}, bias=sizes.bias, cut=cut_of(tp, 1))
        self.inner = inner // tp.size

    @property
    def memory(self) -> MemorySpec:
        return State((self.conv.shape, ((self.inner, self.sizes.state), FLOAT)))

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """As `Mixer`."""
        state = step.memory.state(self.pool)
        found, total_TN = taken(self.inputs, norm, x_TN, residual_TN)
        x_TC, z_TC = found.chunk(2, -1)
        x_TC = state.run(self.conv.over, x_TC)
        low_TR, b_TS, c_TS = self._normed(self.low(x_TC)[0])
        dt_TC = self.ops.step_sizes(self.steps(low_TR)[0], self.dt_bias.value, 0.0, float("inf"))
        y_TC = state.run(self._scan, x_TC, dt_TC, b_TS, c_TS)
        return self.ops.silu_and_mul(self.ops.join(z_TC, y_TC)), total_TN

    def _scan(self, state: StateStep, x_TC: Tensor, dt_TC: Tensor, b_TS: Tensor, c_TS: Tensor) -> Tensor:
        kept, decay_CS = before(self.ops, state, 1), self.ops.decays(self.decay.value)
        rest = decay_CS, b_TS, c_TS, self.skip.value, kept, state.query_start
        y_TC, kept = self.ops.selective_scan(x_TC, dt_TC, *rest)
        keep(self.ops, state, 1, kept)
        return y_TC

    def _normed(self, low: Tensor) -> list[Tensor]:
        """dt, B and C."""
        parts = list(low.split(list(self.widths.values()), -1))
        if self.norms:
            return [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        if self.ones:
            pairs = zip(parts, self.ones, strict=True)
            return [self.ops.rms_norm(part, ones, self.sizes.eps) for part, ones in pairs]
        return parts


def delta(
    ops: Ops, state: StateStep, v_THD: Tensor, q_THS: Tensor, k_THS: Tensor, decay: Tensor, beta_TH: Tensor
) -> Tensor:
    """The gated delta rule over the second of a layer's states (`States.run`)."""
    kept, scale = before(ops, state, 1), q_THS.shape[-1] ** -0.5
    y_THD, kept = ops.gated_delta(q_THS, k_THS, v_THD, decay, beta_TH, kept, state.query_start, scale)
    keep(ops, state, 1, kept)
    return y_THD


@dataclass(frozen=True)
class DeltaSizes:
    """Sizes of the whole model's gated delta net. Each head of q and k serves as many heads of v that follow."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    taps: int
    eps: float
    grouped: bool  # one tensor has all of a key head's rows together (Qwen3-Next); else q, k, v, then z, b and a apart
    apart: bool = False  # grouped: b and a alone are (GGUF)
    tiled: bool = False  # a head of q and k serves every `key_heads`-th head of v (GGUF)


class GatedDelta(Layer):
    """A gated delta net (Yang et al., 2024): norm(y) * silu(z) for each head."""

    row_ops = ("gated_delta",)

    def __init__(self, ctx: BuildContext, hidden_size: int, pool: int, sizes: DeltaSizes) -> None:
        self.ops, self.pool, self.sizes = ctx.ops, pool, sizes
        tp = ctx.mesh.tp
        check_divides("linear_num_key_heads", sizes.key_heads, tp)
        keys, values = sizes.key_heads * sizes.key_size, sizes.value_heads * sizes.value_size
        if sizes.tiled and tp.size > 1 and sizes.value_heads != sizes.key_heads:
            raise ModelLoadError(
                f"tp_size {tp.size}: value heads of this GGUF file are in an order that cannot be shared out; serve it "
                "on one rank, or the safetensors checkpoint"
            )
        rows = _by_head(ctx, sizes) if sizes.grouped else _apart(ctx, sizes)
        self.inputs = Linear(ctx, hidden_size, rows)
        self.conv = Convolution(ctx.child("conv1d"), [keys, keys, values], sizes.taps, bias=False, silu=True)
        self.dt_bias, self.decay = (vector(ctx, name, [sizes.value_heads]) for name in ("dt_bias", "A_log"))
        self.norm = Weight((ctx.child("norm").child("weight").name,), ((sizes.value_size,),), "norm")
        self.out = Linear(ctx, values, {"out_proj": hidden_size}, cut=cut_of(tp, 1))
        self.heads, self.keys, self.values = sizes.value_heads // tp.size, keys // tp.size, values // tp.size
        self.share = sizes.value_heads // sizes.key_heads
        # x / sqrt(sum x^2 + 1e-6), as a root mean square norm.
        self.unit = torch.full((sizes.key_size,), sizes.key_size**-0.5, device=ctx.device)

    @property
    def memory(self) -> MemorySpec:
        sizes = self.sizes
        return State((self.conv.shape, ((self.heads, sizes.key_size, sizes.value_size), FLOAT)))

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """As `Mixer`."""
        sizes, state = self.sizes, step.memory.state(self.pool)
        found, total_TN = taken(self.inputs, norm, x_TN, residual_TN)
        widths = [2 * self.keys + self.values, self.values, self.heads, self.heads]
        mixed_TC, z_TC, b_TH, a_TH = found.split(widths, -1)
        mixed_TC = state.run(self.conv.over, mixed_TC)
        q_TC, k_TC, v_TC = mixed_TC.split([self.keys, self.keys, self.values], -1)
        q_THS, k_THS = (self._unit(x_TC) for x_TC in (q_TC, k_TC))
        decay_TH, beta_TH = self.ops.delta_gates(a_TH, b_TH, self.dt_bias.value, self.decay.value)
        v_THD = v_TC.unflatten(-1, (self.heads, sizes.value_size))
        y_THD = state.run(partial(delta, self.ops), v_THD, q_THS, k_THS, decay_TH, beta_TH)
        z_THD = z_TC.unflatten(-1, (self.heads, sizes.value_size))
        return self.ops.gated_rms_norm(y_THD, z_THD, self.norm.value, sizes.eps, 0, True).flatten(1), total_TN

    def _unit(self, x_TC: Tensor) -> Tensor:
        """Heads of length 1, each as often as it serves: [T, H, S]."""
        size = self.sizes.key_size
        x_TKS = self.ops.rms_norm(x_TC.unflatten(-1, (-1, size)), self.unit, 1e-6 / size)
        return x_TKS if self.share == 1 else self.ops.repeat_heads(x_TKS, self.share, self.sizes.tiled)


def _apart(ctx: BuildContext, sizes: DeltaSizes) -> dict[str, Projection]:
    keys, values = sizes.key_heads * sizes.key_size, sizes.value_heads * sizes.value_size
    cut = cut_of(ctx.mesh.tp, 0)
    found = pieces(ctx, "in_proj_qkv", {"q": keys, "k": keys, "v": values})
    found["in_proj_z"] = Projection(values, cut=cut)
    if sizes.grouped:
        return found
    return found | {name: Projection(sizes.value_heads, cut=cut) for name in ("in_proj_b", "in_proj_a")}


def _by_head(ctx: BuildContext, sizes: DeltaSizes) -> dict[str, Projection]:
    """This rank's rows of the two tensors in which each key head's q, k, v and z, and b and a, lie together; in the
    order all q, all k, all v, all z, all b, all a."""
    share = sizes.value_heads // sizes.key_heads
    values = share * sizes.value_size
    wide = [sizes.key_size, sizes.key_size, values, values]
    first, last = ctx.mesh.tp.span(sizes.key_heads)
    found: dict[str, Projection] = _apart(ctx, sizes) if sizes.apart else {}
    for name, widths in (("in_proj_qkvz", wide), ("in_proj_ba", [share, share]))[sizes.apart :]:
        each = sum(widths)
        for number, width in enumerate(widths):
            for head in range(first, last):
                part = Part(head * each + sum(widths[:number]), total=each * sizes.key_heads)
                found[f"{name}.{number}.{head}"] = Projection(width, name, part)
    return found
