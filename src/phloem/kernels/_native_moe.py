"""Sparse layers over packed weights: one op from router logits to the weighted sum of the experts; and other routers.

Only the weights of experts that some token chose are read, each once per panel of tokens. A token's result depends
neither on the tokens beside it nor on the number of threads: experts are added in ascending order.

Legend: T tokens, N inputs, F inner size, E experts, k choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.kernels import reference_models
from phloem.kernels._native_basic import rows_of
from phloem.kernels.native_linear import NativeLinear, PackedLinear, Sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.calls import WeightSource
    from phloem.kernels.specs import RouterSpec

ALONE = 16384  # up to this many inputs in all, each thread prepares them for itself
PANEL_BYTES = 128 << 20  # what one panel of tokens may take of the workspace


@dataclass(slots=True, eq=False, kw_only=True)
class PackedExperts(PackedLinear):
    """The weights of all experts of one projection, each packed like a linear layer, stacked along out_features.

    Reading rows back sees one matrix `[E * rows of an expert, N]`.
    """

    experts: int
    at: Tensor  # int64 [E + 1]: where an expert's segments begin
    paired_experts: bool  # gate and up of every expert alternate block by block


@dataclass(frozen=True, slots=True)
class _Cut:
    panel: int  # tokens at a time
    tile: int  # bytes per thread for unpacked weights
    alone: int
    total: int  # bytes of workspace


class NativeMoe:
    """`prepare_experts` and `moe` of the native table."""

    def __init__(self, rt: Runtime, linear: NativeLinear) -> None:
        self.rt = rt
        self.linear = linear
        self.MOE = rt.op("moe")
        self.ROUTE, self.most_experts = rt.op("route_tokens"), rt.constant("route.kMostExperts")
        self.active_bytes = rt.constant("moe.kActiveBytes")  # a row of the table of experts that have tokens

    def prepare_experts(
        self, parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, experts: int
    ) -> PackedExperts:
        """Packs expert after expert, as their bytes are in the checkpoint. Raises `ModelLoadError`."""
        each = len(parts) // experts
        packed = [self.linear.prepare_linear(parts[each * e : each * (e + 1)], dtype, device) for e in range(experts)]
        first = packed[0]
        segments: list[Tensor] = []
        starts = [0]
        for number, expert in enumerate(packed):
            if (expert.out_features, expert.in_features) != (first.out_features, first.in_features):
                raise ModelLoadError(f"{parts[each * number].name}: {expert.shape}, but the first expert {first.shape}")
            if expert.paired != first.paired or len(expert.segments) != len(first.segments):
                raise ModelLoadError(f"{parts[each * number].name}: {expert.kinds}, but the first expert {first.kinds}")
            expert.segments[:, 4] += number * first.out_features
            segments.append(expert.segments)
            starts.append(starts[-1] + len(expert.segments))
        forms, padded = 0, first.padded_inputs
        for expert in packed:
            forms |= expert.forms
            if expert.padded_inputs != padded:
                raise ModelLoadError(f"{parts[0].name}: experts of types {first.kinds} and {expert.kinds} in one layer")
        return PackedExperts(
            first.in_features, experts * first.out_features, padded,
            tuple(kind for expert in packed for kind in expert.kinds), forms, False,
            sum(expert.nbytes for expert in packed), dtype, torch.cat(segments),
            [block for expert in packed for block in expert.memory], self.linear, None,
            experts=experts, at=torch.tensor(starts), paired_experts=first.paired,
        )  # fmt: skip

    def moe(
        self, x: Tensor, logits: Tensor, gate_up: PackedExperts, down: PackedExperts, top_k: int, renormalise: bool
    ) -> Tensor:
        """x[T, N], logits[T, E] -> [T, N]: softmax, the best k experts of each token, their gated MLPs with SiLU."""
        x_TN, logits_TE = rows_of(x), rows_of(logits)
        if logits_TE.shape[0] != x_TN.shape[0] or logits_TE.shape[1] != gate_up.experts:
            raise ValueError(
                f"logits {list(logits_TE.shape)} for {x_TN.shape[0]} tokens and weights of {gate_up.experts} and "
                f"{down.experts} experts"
            )
        return self._compute(x_TN, logits_TE, None, gate_up, down, top_k, renormalise).view(x.shape)

    def chosen_experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: PackedExperts, down: PackedExperts
    ) -> Tensor:
        """x[T, N], int32 ids and float32 weights [T, k] -> [T, N]: the same for experts that were chosen elsewhere.
        Ids that no expert here has add nothing."""
        x_TN, ids_Tk, weights_Tk = rows_of(x), ids.contiguous(), weights.contiguous()
        if ids_Tk.shape != weights_Tk.shape or ids_Tk.shape[0] != x_TN.shape[0]:
            raise ValueError(f"ids {list(ids_Tk.shape)} and weights {list(weights_Tk.shape)} of {x_TN.shape[0]} tokens")
        if ids_Tk.dtype != torch.int32 or weights_Tk.dtype != torch.float32:
            raise TypeError(f"ids are {ids_Tk.dtype}, weights {weights_Tk.dtype}: int32 and float32 are taken")
        choices = ids_Tk.shape[1]
        return self._compute(x_TN, None, (ids_Tk, weights_Tk), gate_up, down, choices, False).view(x.shape)

    def route(self, logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
        """As `reference_models.route`, which takes the routers that the kernel does not know."""
        logits_TE = rows_of(logits_TE)
        tokens, experts = logits_TE.shape
        if spec.score not in ("softmax", "sigmoid") or experts > self.most_experts:
            return reference_models.route(logits_TE, bias_E, spec)
        grouped, each = spec.groups > 1, experts // spec.groups
        odd = experts % spec.groups or not 0 < spec.keep <= spec.groups or not 0 < spec.group_best <= each
        if not 0 < spec.top_k <= experts or (grouped and odd):
            raise ValueError(f"{spec} of {experts} experts")
        if bias_E is not None and (bias_E.dtype != torch.float32 or bias_E.shape != (experts,)):
            raise ValueError(f"a correction of {bias_E.dtype} {list(bias_E.shape)} for {experts} experts")
        ids_Tk = self.rt.empty((tokens, spec.top_k), torch.int32)
        weights_Tk = self.rt.empty((tokens, spec.top_k))
        if tokens:
            bias_E = None if bias_E is None else bias_E.contiguous()
            self.rt.call(
                self.ROUTE, tokens * experts * 4, logits=logits_TE.data_ptr(), logits_stride=logits_TE.stride(0),
                bias=None if bias_E is None else bias_E.data_ptr(), ids=ids_Tk.data_ptr(),
                weights=weights_Tk.data_ptr(), tokens=tokens, experts=experts, choices=spec.top_k,
                sigmoid=spec.score == "sigmoid", renormalise=spec.renormalise, groups=spec.groups, keep=spec.keep,
                group_best=spec.group_best, eps=spec.eps, floor=spec.floor, scale=spec.scale,
            )  # fmt: skip
        return ids_Tk, weights_Tk

    def _compute(
        self,
        x_TN: Tensor,
        logits_TE: Tensor | None,
        choice: tuple[Tensor, Tensor] | None,
        gate_up: PackedExperts,
        down: PackedExperts,
        top_k: int,
        renormalise: bool,
    ) -> Tensor:
        (tokens, n), experts = x_TN.shape, gate_up.experts
        inner = down.in_features
        _check(x_TN, gate_up, down, top_k, most=experts if choice is None else top_k)
        out = self.rt.empty(x_TN.shape)
        if tokens == 0:
            return out
        stride = inner if gate_up.paired_experts else 2 * inner
        threads = self.rt.library.threads()
        cut = self._cut(tokens, top_k, stride, threads, gate_up, down)
        space = self.linear.workspace.take(cut.total, self.rt)
        slots = tokens * top_k
        active = min(experts, slots)
        work = active * (gate_up.nbytes + down.nbytes) // experts // 40 + slots * 3 * n * inner // 400
        self.rt.call(
            self.MOE, work, x=x_TN.data_ptr(), x_stride=x_TN.stride(0), tokens=tokens, inputs=n, inner=inner,
            logits=None if logits_TE is None else logits_TE.data_ptr(),
            logits_stride=0 if logits_TE is None else logits_TE.stride(0),
            ids=None if choice is None else choice[0].data_ptr(),
            weights=None if choice is None else choice[1].data_ptr(), experts=experts, choices=top_k,
            renormalise=renormalise, out=out.data_ptr(), workspace=space.data_ptr(),
            gate_up=gate_up.segments.data_ptr(), gate_up_at=gate_up.at.data_ptr(), up_kinds=gate_up.forms,
            up_padded=gate_up.padded_inputs, paired=gate_up.paired_experts,
            down=down.segments.data_ptr(), down_at=down.at.data_ptr(), down_kinds=down.forms,
            down_padded=down.padded_inputs, hidden_stride=stride,
            panel_tokens=cut.panel, tile_bytes=cut.tile, alone=cut.alone, threads=threads,
        )  # fmt: skip
        return out

    def _cut(self, tokens: int, k: int, stride: int, threads: int, gate_up: PackedExperts, down: PackedExperts) -> _Cut:
        """How one call is cut, and its workspace: the sum of what `Sparse` of csrc/cpu/each/moe.cpp lays out."""
        sizes: Sizes = self.linear.sizes
        up_row = sizes.row_bytes(gate_up.padded_inputs, gate_up.forms)
        down_row = sizes.row_bytes(down.padded_inputs, down.forms)
        token = up_row + k * (up_row + down_row + 4 * stride)
        panel = max(1, min(tokens, PANEL_BYTES // token))
        slots = panel * k
        table = 4 * _up64(4 * slots) + _up64(4 * gate_up.experts)
        table += (min(slots, gate_up.experts) + 1) * self.active_bytes
        prepared = _up64(table) + panel * up_row + slots * (down_row + (up_row if tokens > 1 else 0))
        few = tokens * gate_up.padded_inputs + tokens * k * down.padded_inputs <= ALONE
        alone = few and gate_up.paired_experts and panel == tokens
        tile = sizes.tile_bytes(max(gate_up.padded_inputs, down.padded_inputs))
        total = threads * tile + _up64(4 * slots * stride) + prepared * (threads if alone else 1)
        return _Cut(panel, tile, int(alone), total)


def _check(x_TN: Tensor, gate_up: PackedExperts, down: PackedExperts, top_k: int, most: int) -> None:
    n, experts = x_TN.shape[1], gate_up.experts
    if down.experts != experts:
        raise ValueError(f"weights of {experts} and {down.experts} experts")
    if gate_up.in_features != n or down.out_features != experts * n:
        raise ValueError(f"the experts take {gate_up.in_features} inputs, not {n}")
    if gate_up.out_features != 2 * experts * down.in_features:
        raise ValueError(f"gate and up give {gate_up.out_features // experts}, down takes {down.in_features}")
    if not 0 < top_k <= most:
        raise ValueError(f"{top_k} experts of {experts}")


def _up64(size: int) -> int:
    return (size + 63) // 64 * 64


def ops(rt: Runtime, linear: NativeLinear) -> dict[str, Any]:
    """The table's entries."""
    native = NativeMoe(rt, linear)
    return {
        "prepare_experts": native.prepare_experts,
        "moe": native.moe,
        "chosen_experts": native.chosen_experts,
        "chooses_apart": True,
        "route": native.route,
    }
