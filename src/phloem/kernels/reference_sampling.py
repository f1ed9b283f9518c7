"""From hidden states and logits to tokens in plain torch, in float64 where tokens are drawn. Legend as in `ops.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from phloem.kernels.calls import Draw

_MASK64 = (1 << 64) - 1


def linear_topk(
    x_TN: Tensor, weight_VN: Tensor, k: int, scale_TJ: Tensor | None = None, norms: int = 0, cap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`Ops.linear_topk`: the k largest logits of each row, their ids, and log-sum-exps, from whole rows."""
    logits_TV = x_TN.float() @ weight_VN.float().T
    if cap:
        logits_TV = cap * torch.tanh(logits_TV / cap)
    return top_of_logits(logits_TV, k, scale_TJ, norms)


def top_of_logits(
    logits_TV: Tensor, k: int, scale_TJ: Tensor | None = None, norms: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of logits that are there. Rows shorter than k end in -inf with id 0."""
    values_TV, ids_TV = torch.sort(logits_TV, dim=-1, descending=True, stable=True)
    missing = max(0, k - logits_TV.shape[1])
    values_Tk = F.pad(values_TV[:, :k], (0, missing), value=float("-inf"))
    ids_Tk = F.pad(ids_TV[:, :k], (0, missing)).int()
    if scale_TJ is None:
        scale_TJ = torch.ones(logits_TV.shape[0], norms)
    sums_TJ = torch.logsumexp(logits_TV.double().unsqueeze(1) * scale_TJ.double().unsqueeze(2), -1)
    return values_Tk, ids_Tk, sums_TJ.float()


def uniform(seed: int, position: int) -> float:
    """The draw of a seed at a position: splitmix64, its upper 24 bits, in [0, 1)."""
    z = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((z ^ (z >> 31)) >> 40) * 2.0**-24


def kept_tokens(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Weights (not normalised) of the tokens that the filters keep, zero elsewhere; float64."""
    probs_V = (logits_V.double() / temperature).softmax(-1)
    best, order = probs_V.sort(descending=True, stable=True)
    rank = torch.arange(len(best), device=best.device)
    keep = rank < (top_k if 0 < top_k < len(best) else len(best))
    left = best * keep
    before = left.cumsum(-1) - left
    keep &= (before < top_p * left.sum()) | (rank == 0)
    keep &= best >= min_p * best[0]
    return torch.zeros_like(probs_V).scatter_(0, order, best * keep)


def sample(logits_LV: Tensor, draw: Draw) -> Tensor:
    """Row by row: greedy, or the draw inverted through the kept weights in token-id order."""
    tokens: list[int] = []
    for row, logits_V in enumerate(logits_LV):
        temperature, top_k = float(draw.temperature[row]), int(draw.top_k[row])
        if temperature <= 0 or top_k == 1:
            tokens.append(int(logits_V.argmax()))
            continue
        weights_V = kept_tokens(logits_V, temperature, top_k, float(draw.top_p[row]), float(draw.min_p[row]))
        sums_V = weights_V.cumsum(-1)
        target = uniform(int(draw.seeds[row]) & _MASK64, int(draw.positions[row])) * sums_V[-1]
        tokens.append(int(torch.searchsorted(sums_V, target, right=True)))
    return torch.tensor(tokens, dtype=torch.int32, device=logits_LV.device)
