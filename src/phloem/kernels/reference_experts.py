"""Mixture of experts in plain torch. Legend as in `ops.py`; E experts, k choices of a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.kernels.reference import prepare_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kernels.calls import WeightSource


def route(logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then the best k: weights float32 [T, k] and ids int32 [T, k]."""
    weights, ids = logits_TE.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, ids = weights[:, :top_k], ids[:, :top_k]
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32)


def experts(x_TN: Tensor, weights_Tk: Tensor, ids_Tk: Tensor, gate_up_EMN: Tensor, down_ENF: Tensor) -> Tensor:
    """Sum over a token's choices of weight * down(silu(gate(x)) * up(x)), one expert after another."""
    total_TN = torch.zeros(x_TN.shape, dtype=torch.float32, device=x_TN.device)
    for expert in range(down_ENF.shape[0]):
        token, choice = (ids_Tk == expert).nonzero(as_tuple=True)
        if len(token):
            gate, up = F.linear(x_TN[token], gate_up_EMN[expert]).chunk(2, -1)
            part = F.linear(F.silu(gate) * up, down_ENF[expert])
            total_TN.index_add_(0, token, part.float() * weights_Tk[token, choice].float()[:, None])
    return total_TN.to(x_TN.dtype)


def chosen_experts(x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`experts` over what `prepare_experts` made; ids that no expert here has add nothing."""
    count = down.shape[0] // x_TN.shape[1]
    gate_up_EMN, down_ENF = gate_up.unflatten(0, (count, -1)), down.unflatten(0, (count, -1))
    return experts(x_TN.to(gate_up.dtype), weights_Tk, ids_Tk, gate_up_EMN, down_ENF).to(x_TN.dtype)


def prepare_experts(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, experts: int) -> Tensor:
    """All parts stacked along out_features: one dense tensor."""
    del experts
    return prepare_linear(parts, dtype, device)


def moe(x_TN: Tensor, logits_TE: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalise: bool) -> Tensor:
    """`route`, then `experts`; gate_up [E * 2F, N] and down [E * N, F] are stacked, and may be of a narrower type."""
    weights_Tk, ids_Tk = route(logits_TE, top_k, renormalise)
    count = logits_TE.shape[1]
    gate_up_EMN, down_ENF = gate_up.unflatten(0, (count, -1)), down.unflatten(0, (count, -1))
    return experts(x_TN.to(gate_up.dtype), weights_Tk, ids_Tk, gate_up_EMN, down_ENF).to(x_TN.dtype)
