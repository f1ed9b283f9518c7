"""Experts of any kind, and of weights of 4 bits: how their products are computed for so many tokens (`grouped.py`).

Launches behind the router: two up to `FEW_TOKENS` tokens, where a plain router is part of the first; beyond, the
sorting, two products and a sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phloem.kernels.triton.choices import sum_choices
from phloem.kernels.triton.grouped import KINDS, Pair, Shape, parts_of_any
from phloem.kernels.triton.grouped_few import few_any
from phloem.kernels.triton.nibbles import Stack
from phloem.kernels.triton.route import CHOSEN_EXPERTS, FEW_TOKENS, route, route_and_sort, sort_by_expert, tile_size
from phloem.kernels.triton.weights import Form, Int4Experts, Mxfp4Weight, widened

if TYPE_CHECKING:
    from phloem.kernels.specs import ExpertSpec


def four_bits(gate_up: Tensor | Form, down: Tensor | Form) -> bool:
    """Whether either of them is."""
    return isinstance(gate_up, Int4Experts | Mxfp4Weight) or isinstance(down, Int4Experts | Mxfp4Weight)


def _stack(weight: Tensor | Form) -> Stack:
    match weight:
        case Int4Experts():
            return Stack(weight.packed, weight.scale, weight.zero)
        case Mxfp4Weight():
            return Stack(weight.packed, weight.scale)
        case _:
            return Stack(widened(weight))


def pair_of(
    gate_up: Tensor | Form, down: Tensor | Form, spec: ExpertSpec, biases: tuple[Tensor, Tensor] | None = None
) -> Pair:
    """Both products of experts, stacked as gate_up [E * 2F, N] (without gates [E * F, N]) and down [E * N, F]."""
    shape = Shape(KINDS[spec.activation], spec.gated, spec.limit, spec.alpha, spec.scale_input)
    return Pair(_stack(gate_up), _stack(down), spec.experts, biases, shape)


def summed(x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, pair: Pair, dtype: torch.dtype) -> Tensor:
    """What the chosen experts make of x, in x's type; ids of no expert here add nothing. `dtype`: of the products."""
    x, weights_Tk, ids_Tk = x_TN.to(dtype), weights_Tk.float().contiguous(), ids_Tk.to(torch.int32).contiguous()
    if not len(x):
        return torch.empty_like(x_TN)
    if len(x) <= FEW_TOKENS:
        return few_any(x, weights_Tk, ids_Tk, pair).to(x_TN.dtype)
    tile = tile_size(ids_Tk.numel(), pair.count)
    parts = parts_of_any(x, weights_Tk, pair, sort_by_expert(ids_Tk, pair.count, tile), tile)
    return sum_choices(parts, ids_Tk, pair.count, foreign=True).to(x_TN.dtype)


def routed(x_TN: Tensor, logits_TE: Tensor, pair: Pair, top_k: int, renormalise: bool) -> Tensor:
    """The same of those that a softmax of the router's logits chooses."""
    tokens, count = logits_TE.shape
    if not tokens:
        return torch.empty_like(x_TN)
    if tokens <= FEW_TOKENS and count <= CHOSEN_EXPERTS:
        weights_Tk = torch.empty((tokens, top_k), dtype=torch.float32, device=x_TN.device)
        ids_Tk = torch.empty((tokens, top_k), dtype=torch.int32, device=x_TN.device)
        return few_any(x_TN, weights_Tk, ids_Tk, pair, logits_TE, renormalise)
    if tokens <= FEW_TOKENS:
        return few_any(x_TN, *route(logits_TE, top_k, renormalise), pair)
    tile = tile_size(tokens * top_k, count)
    weights_Tk, ids_Tk, lists = route_and_sort(logits_TE, top_k, renormalise, tile)
    return sum_choices(parts_of_any(x_TN, weights_Tk, pair, lists, tile), ids_Tk, count, foreign=False)
