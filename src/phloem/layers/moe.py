"""The sparse feed-forward block: a router picks a few experts for each token (Shazeer et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import ExpertSpec, RouterSpec
from phloem.layers.linear import Linear
from phloem.layers.placed import PlacedExperts, fits_plain
from phloem.layers.weight import Cut, Layer, Part, Weight, check_divides, cut_of
from phloem.layers.worn import Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.layers.context import BuildContext
    from phloem.layers.mlp import GatedMLP, PlainMLP
    from phloem.layers.norm import AnyNorm
    from phloem.layers.worn import WornExperts

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}


@dataclass(frozen=True)
class ExpertNames:
    """Where a checkpoint keeps a sparse block's tensors, below the block. `{}` is an expert's number; without it, the
    tensor stacks all experts along its first axis.

    One name for gate and up: their rows lie in one tensor, gate first, or alternating.
    """

    router: str = "gate"
    correction: str = ""  # the vector that is added to scores to decide who is chosen
    correction_row: bool = False  # stored as [1, experts]
    gate: str = "experts.{}.gate_proj.weight"
    up: str = "experts.{}.up_proj.weight"
    down: str = "experts.{}.down_proj.weight"
    gate_bias: str = ""
    up_bias: str = ""
    down_bias: str = ""
    transposed: bool = False  # matrices are [in_features, out_features]
    alternating: bool = False
    latent_in: str = (
        "fc1_latent_proj"  # what experts read and what becomes of their sum, where they are of fewer features
    )
    latent_out: str = "fc2_latent_proj"


@dataclass(frozen=True)
class ExpertsConfig:
    """Sizes of a sparse block, and how it chooses and computes."""

    count: int
    inner_size: int
    router: RouterSpec
    experts: ExpertSpec | None = None  # None: gated MLPs with SiLU
    router_bias: bool = False
    names: ExpertNames = field(default_factory=ExpertNames)
    latent: int = 0  # how many features experts read and give; 0: those of hidden states
    latent_bias: bool = False
    identities: int = 0  # more that may be chosen, behind the others: they give what they read


def softmax_experts(count: int, per_token: int, inner_size: int, activation: str, renormalise: bool) -> ExpertsConfig:
    """The plain block: softmax over all experts, the best k of them, gated MLPs.

    Raises:
        ModelLoadError: for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ModelLoadError(
            f"experts with activation {activation!r} (hidden_act); known: {', '.join(sorted(ACTIVATIONS))}"
        )
    spec = ExpertSpec(count, ACTIVATIONS[activation])  # pyright: ignore[reportArgumentType]
    return ExpertsConfig(count, inner_size, RouterSpec(per_token, renormalise=renormalise), spec)


class SparseMLP(Layer):
    """Router and experts. With a plain router and plain experts one op does all (`Ops.moe`); plain experts of another
    router are those of `route` and `chosen_experts` where the table says so (`Ops.chooses_apart`); otherwise `route`
    and `experts` do."""

    worn: WornExperts | None = None  # of the adapter whose rows are computed now, where it has additions to experts

    def __init__(self, ctx: BuildContext, hidden_size: int, config: ExpertsConfig) -> None:
        self.name = ctx.name
        if not 0 < config.router.top_k <= config.count:
            raise ModelLoadError(f"num_experts_per_tok: {config.router.top_k} of {config.count} experts")
        groups, keep = config.router.groups, config.router.keep
        if groups > 1 and (config.count % groups or not 0 < keep <= groups):
            raise ModelLoadError(f"n_group: {groups} groups of {config.count} experts, topk_group: {keep} of them")
        self.ops, self.config, names = ctx.ops, config, config.names
        mesh = ctx.mesh
        self.comm = ctx.comm if mesh.expert_tp.size * mesh.ep.size > 1 else None
        if self.comm is not None and self.comm.size != mesh.expert_tp.size * mesh.ep.size:
            raise ModelLoadError("experts are shared out among the ranks that attend together")
        self.biased = mesh.expert_tp.rank == 0  # a bias is added by one rank of those that have the expert
        self.spread, choices = None, config.count + config.identities
        redundant = 0 if ctx.spread is None else ctx.spread.redundant
        what = "experts and redundant ones" if redundant else "experts"
        check_divides(what, config.count + redundant, mesh.ep, "ep_size")
        if ctx.spread is not None:
            self.spread = ctx.spread.enter(ctx.name, mesh.ep, config.count, choices, ctx.device)
        check_divides("an expert's inner size", config.inner_size, mesh.expert_tp, "tp_size")
        own = list(range(*mesh.ep.span(config.count))) if self.spread is None else self.spread.own
        spec = config.experts or ExpertSpec(config.count)
        self.spec = replace(spec, experts=len(own), first=own[0] if self.spread is None else self.spread.first)
        self.router = Linear(ctx, hidden_size, {names.router: choices}, bias=config.router_bias)
        self.correction = None
        if names.correction:
            shape = (1, choices) if names.correction_row else (choices,)
            self.correction = Weight((ctx.child(names.correction).name,), (shape,), "norm")
        self.identities = bool(config.identities) and self.biased and mesh.ep.rank == 0
        biased = bool(names.down_bias)
        plain = config.router.plain and self.spec.plain and not biased and self.correction is None
        self.notes = ctx.chosen
        self.number = 0 if ctx.chosen is None else ctx.chosen.enter(ctx.name, config.router.top_k)
        # That op takes as many experts as the router has logits.
        self.fused = plain and mesh.ep.size == 1 and ctx.chosen is None and self.spread is None
        placed = ctx.aside is not None and not (self.fused and ctx.aside.same and not ctx.aside.deferred)
        if placed and config.latent and ctx.aside is not None and ctx.aside.deferred:
            raise ModelLoadError("kt_max_deferred_experts_per_token: experts of latent features are not deferred")
        prepared = fits_plain(self.spec, biased=biased) if placed else self.fused
        self.fused = self.fused and not placed
        # Those ops have no first expert: ids are of all.
        self.apart = not placed and not self.fused and ctx.ops.chooses_apart and mesh.ep.size == 1
        self.apart = self.apart and fits_plain(self.spec, biased=biased)
        self.narrow = self.widen = None
        self._width = config.latent or hidden_size
        if config.latent:
            bias = config.latent_bias
            self.narrow = Linear(ctx, hidden_size, {names.latent_in: config.latent}, bias=bias)
            self.widen = Linear(ctx, config.latent, {names.latent_out: hidden_size}, bias=bias)
        alike = not placed and ctx.ops.stacks_alike and fits_plain(replace(self.spec, first=0), biased=biased)
        self._stack = _Stack(ctx, config, prepared or self.apart or alike, placed)
        self.gate_up, self.down, self.biases = self.slots(own)
        self.placed: PlacedExperts | None = None
        if placed and ctx.aside is not None:
            device, pair_of = (ctx.ops, ctx.dtype, ctx.device), (self.gate_up, self.down)
            self.placed = PlacedExperts(ctx.aside, device, self.spec, pair_of, self.biases, config.router.top_k)

    def slots(self, own: Sequence[int]) -> tuple[Weight, Weight, tuple[Weight, Weight] | None]:
        """For the matrices of these experts: gate and up, down, and the biases of both, if there are any."""
        names, inner, stack = self.config.names, self.config.inner_size, self._stack
        mesh = stack.ctx.mesh
        rows, cols = cut_of(mesh.expert_tp, 0), cut_of(mesh.expert_tp, 1)
        pair, pair_bias = (names.gate, names.up), (names.gate_bias, names.up_bias)
        if not self.spec.gated:
            pair, pair_bias = pair[1:], pair_bias[1:]
        gate_up = stack.slot(own, pair, (inner, self._width), "matrix", rows)
        down = stack.slot(own, (names.down,), (self._width, inner), "matrix", cols)
        if not names.down_bias:
            return gate_up, down, None
        up_bias = stack.slot(own, pair_bias, (inner,), "norm", rows)
        return gate_up, down, (up_bias, stack.slot(own, (names.down_bias,), (self._width,), "norm", None))

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `GatedMLP`, and never summed: router and experts both read the normed input, the sum is not theirs."""
        del add
        x_TN, residual_TN = (x_TN, x_TN) if norm is None else norm.add(x_TN, residual_TN)
        return self.start(x_TN)(), residual_TN

    def start(self, x_TN: Tensor) -> Callable[[], Tensor]:
        """Choose experts, and start those of another machine; what is given computes the others, and sums."""
        logits_TE, _ = self.router(x_TN)
        x_TN = x_TN if self.narrow is None else self.narrow(x_TN)[0]
        placed = self.placed
        if placed is None:
            return lambda: self._widened(self._summed(self._chosen(x_TN, logits_TE)))
        begun = placed.begin(x_TN, *self._routed(logits_TE))
        return lambda: self._widened(placed.end(begun))

    def _widened(self, x_TN: Tensor) -> Tensor:
        return x_TN if self.widen is None else self.widen(x_TN)[0]

    def _summed(self, x_TN: Tensor) -> Tensor:
        return x_TN if self.comm is None else self.comm.all_reduce(x_TN)

    def rows_for(self, x_TN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What experts read of these rows, [T, width]; which they are, [T, k], and their weights, [T, k]."""
        logits_TE, _ = self.router(x_TN)
        return x_TN if self.narrow is None else self.narrow(x_TN)[0], *self._routed(logits_TE)

    def own_part(self, x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """What this rank's experts alone make of rows; those of others, and -1, give nothing."""
        biases = None if self.biases is None else (self.biases[0].value, self.biases[1].value)
        weights = self.gate_up.value, self.down.value
        return self.ops.experts(x_TN, self.placed_at(ids_Tk), weights_Tk, *weights, self.spec, biases)

    def with_identities(self, out_TN: Tensor, x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """And what experts that give back what they read make of rows."""
        if not self.config.identities:
            return out_TN
        kept_T = self.ops.weights_from(ids_Tk, weights_Tk, self.config.count)
        return self.ops.add(out_TN, self.ops.scale_rows(x_TN, kept_T))

    def widened(self, x_TN: Tensor) -> Tensor:
        return self._widened(x_TN)

    def _routed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each token has, and their weights."""
        correction_E = None if self.correction is None else self.correction.value.view(-1)
        found = self.ops.route(logits_TE, correction_E, self.config.router)
        if self.notes is not None:
            self.notes.notes[self.number] = found[0]
        if self.spread is not None:
            self.spread.note(found[0])
        return found

    def placed_at(self, ids_Tk: Tensor) -> Tensor:
        """The slots, over all ranks, of chosen experts."""
        return ids_Tk if self.spread is None else self.spread.slots_of(ids_Tk)

    def _chosen(self, x_TN: Tensor, logits_TE: Tensor) -> Tensor:
        """What the experts that the logits choose make of x."""
        spec = self.config.router
        if self.worn is not None:
            return self._worn(self.worn, x_TN, logits_TE)
        if self.fused:
            weights = self.gate_up.value, self.down.value
            return self.ops.moe(x_TN, logits_TE, *weights, spec.top_k, spec.renormalise)
        ids_Tk, weights_Tk = self._routed(logits_TE)
        if self.apart:
            out_TN = self.ops.chosen_experts(x_TN, ids_Tk, weights_Tk, self.gate_up.value, self.down.value)
            return self._with_identities(out_TN, x_TN, ids_Tk, weights_Tk)
        biases = None if self.biases is None else (self.biases[0].value, self.biases[1].value)
        if biases is not None and not self.biased:
            biases = biases[0], torch.zeros_like(biases[1])
        weights, at_Tk = (self.gate_up.value, self.down.value), self.placed_at(ids_Tk)
        out_TN = self.ops.experts(x_TN, at_Tk, weights_Tk, *weights, self.spec, biases)
        return self._with_identities(out_TN, x_TN, ids_Tk, weights_Tk)

    @property
    def adaptable(self) -> str:
        """Why experts here take no additions; "": they do."""
        if self.placed is not None or self.spread is not None:
            return "experts here lie apart from the model, or have several places"
        if self.comm is not None:
            return "ranks share the experts out"
        return "experts with biases take no additions" if self.biases is not None else ""

    def _worn(self, worn: WornExperts, x_TN: Tensor, logits_TE: Tensor) -> Tensor:
        """Experts with additions one after another, the others as ever."""
        ids_Tk, weights_Tk = self._routed(logits_TE)
        own_Tk = torch.isin(ids_Tk, torch.tensor(sorted(worn.added), dtype=ids_Tk.dtype, device=ids_Tk.device))
        pair = Reader(self.ops, self.gate_up), Reader(self.ops, self.down)
        out_TN = worn(x_TN, ids_Tk, weights_Tk, self.spec, pair).to(x_TN.dtype)
        if not bool(own_Tk.all()):
            rest_Tk = ids_Tk.masked_fill(own_Tk, -1)
            weights = self.gate_up.value, self.down.value
            if self.fused or self.apart:
                others_TN = self.ops.chosen_experts(x_TN, rest_Tk, weights_Tk, *weights)
            else:
                others_TN = self.ops.experts(x_TN, rest_Tk, weights_Tk, *weights, self.spec, None)
            out_TN = self.ops.add(out_TN, others_TN)
        return self._with_identities(out_TN, x_TN, ids_Tk, weights_Tk)

    def _with_identities(self, out_TN: Tensor, x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """And of experts that give back what they are given, of which one rank sums."""
        return self.with_identities(out_TN, x_TN, ids_Tk, weights_Tk) if self.identities else out_TN


class Starts(Protocol):
    """A sparse block of which experts may be under way while something else is computed."""

    def start(self, x_TN: Tensor, /) -> Callable[[], Tensor]: ...


class Block(Protocol):
    """A dense block, as `GatedMLP`."""

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, /, *, add: bool
    ) -> tuple[Tensor, Tensor | None]: ...


class SharedExperts(Layer):
    """A sparse block beside a dense one, of which every token's output is part: sparse(x) + dense(x), or with a gate
    sparse(x) + sigmoid(gate(x)) dense(x). `gate`: the name of its tensor, [1, hidden size]."""

    def __init__(
        self, ctx: BuildContext, hidden_size: int, sparse: SparseMLP, dense: GatedMLP | PlainMLP, gate: str = ""
    ) -> None:
        self.ops = ctx.ops
        self.sparse: Starts = sparse
        self.dense: Block = dense
        self.gate = Linear(ctx, hidden_size, {gate: 1}) if gate else None

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `SparseMLP`."""
        del add
        x_TN, residual_TN = (x_TN, x_TN) if norm is None else norm.add(x_TN, residual_TN)
        sparse = self.sparse.start(x_TN)
        shared_TN, _ = self.dense(None, x_TN, None, add=False)
        if self.gate is not None:
            shared_TN = self.ops.sigmoid_mul(shared_TN, self.gate(x_TN)[0])
        return self.ops.add(sparse(), shared_TN), residual_TN


@dataclass(frozen=True)
class _Stack:
    """Makes the slots of experts that this rank has: each expert's matrices, one expert after another."""

    ctx: BuildContext
    config: ExpertsConfig
    fused: bool
    aside: bool  # on the host, beside the device

    def slot(
        self, experts: Sequence[int], patterns: tuple[str, ...], shape: tuple[int, ...], role: str, cut: Cut | None
    ) -> Weight:
        """`experts`: those that this rank has, in their order; `patterns`: names of an expert's tensors; `shape`: of
        each of them."""
        names = [self._name(pattern, e) for e in experts for pattern in patterns]
        found = Weight(tuple(names), (shape,) * len(names), role, fused=self.fused)  # pyright: ignore[reportArgumentType]
        found.experts, found.aside = len(experts) if role == "matrix" else 0, self.aside
        places = [self._part(patterns, place, shape) for place in range(len(patterns))]
        if any(places):
            found.parts = tuple(self._of_expert(patterns[i], places[i], e) for e in experts for i in range(len(places)))
        if cut is not None:
            found.cuts = ((cut,),) * len(names)
        others = [e for e in range(self.config.count) if e not in experts]
        elsewhere = (self._name(pattern, e) for e in others for pattern in patterns if "{}" in pattern)
        found.elsewhere = tuple(elsewhere)
        return found

    def _name(self, pattern: str, expert: int) -> str:
        return self.ctx.child(pattern.replace("{}", str(expert))).name

    def _part(self, patterns: tuple[str, ...], place: int, shape: tuple[int, ...]) -> Part | None:
        """Where an expert's matrix lies in the tensor that holds it."""
        names = self.config.names
        shared = len(patterns) == 2 and patterns[0] == patterns[1]
        if not shared and not names.transposed and "{}" in patterns[place]:
            return None
        if not shared:
            return Part(transposed=names.transposed)
        start, step = (place, 2) if names.alternating else (place * shape[0], 1)
        return Part(start, step, names.transposed)

    def _of_expert(self, pattern: str, part: Part | None, expert: int) -> Part | None:
        if part is None or "{}" in pattern:
            return part
        return replace(part, expert=expert, experts=self.config.count)
