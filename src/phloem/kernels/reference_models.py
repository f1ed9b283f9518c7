"""Plain torch of the ops that only some families need: routers and experts, elementwise ones, tables of rotation.

Legend as in `ops.py`; E experts, k choices, F inner size. Reductions and scores in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.kernels.specs import ExpertSpec, RouterSpec


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Which experts each token goes to: ids int32 [T, k], weights float32 [T, k]; of equals the lowest id first."""
    logits_TE = logits_TE.float()
    if spec.score == "sparse_mixer":
        return _sparse_mixer(logits_TE, spec)
    late = spec.score.startswith("chosen_")
    score_TE = logits_TE if late else _score(logits_TE, spec.score)
    rank_TE = score_TE if bias_E is None else score_TE + bias_E.float()
    if spec.groups > 1:
        rank_TE = _within_groups(rank_TE, spec)
    ids_Tk = rank_TE.sort(dim=-1, descending=True, stable=True)[1][:, : spec.top_k]
    weights_Tk = score_TE.gather(1, ids_Tk)
    if late:
        weights_Tk = _score(weights_Tk, spec.score.removeprefix("chosen_"))
    if spec.renormalise:
        total_T1 = weights_Tk.sum(-1, keepdim=True) + spec.eps
        weights_Tk = weights_Tk / (total_T1.clamp_min(spec.floor) if spec.floor else total_T1)
    return ids_Tk.to(torch.int32), weights_Tk if spec.scale == 1.0 else weights_Tk * spec.scale


def weights_from(ids_Tk: Tensor, weights_Tk: Tensor, first: int) -> Tensor:
    """The sum of each token's weights of ids from `first` on, float32 [T]."""
    return weights_Tk.float().masked_fill(ids_Tk < first, 0.0).sum(-1)


def _sparse_mixer(logits_TE: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    ids: list[Tensor] = []
    weights: list[Tensor] = []
    left_TE = logits_TE
    for _ in range(spec.top_k):
        best_T1, id_T1 = left_TE.max(-1, keepdim=True)
        far_TE = (best_T1 - logits_TE) / logits_TE.abs().maximum(best_T1) > 2 * spec.jitter
        weights.append(left_TE.masked_fill(far_TE, float("-inf")).softmax(-1).gather(1, id_T1))
        ids.append(id_T1)
        left_TE = left_TE.scatter(1, id_T1, float("-inf"))
    return torch.cat(ids, 1).to(torch.int32), torch.cat(weights, 1)


def _score(logits: Tensor, kind: str) -> Tensor:
    return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


def _within_groups(rank_TE: Tensor, spec: RouterSpec) -> Tensor:
    """-inf outside the groups that are kept."""
    rank_TGe = rank_TE.unflatten(1, (spec.groups, -1))
    value_TG = rank_TGe.topk(spec.group_best, dim=-1)[0].sum(-1)
    kept_Tg = value_TG.sort(dim=-1, descending=True, stable=True)[1][:, : spec.keep]
    out_TG = torch.ones_like(value_TG, dtype=torch.bool).scatter_(1, kept_Tg, False)
    return rank_TGe.masked_fill(out_TG.unsqueeze(-1), float("-inf")).flatten(1)


def experts(
    x_TN: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up: Tensor,
    down: Tensor,
    spec: ExpertSpec,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sum over a token's choices of weight * expert(x), one expert after another; x's type, weights in their own.

    gate_up [E * 2F, N] (ungated: [E * F, N]) and down [E * N, F] as `stack_experts` makes them; biases of both, stacked
    alike.
    """
    up_EMN, down_ENF = gate_up.unflatten(0, (spec.experts, -1)), down.unflatten(0, (spec.experts, -1))
    up_bias, down_bias = (
        (None, None) if biases is None else (bias.to(gate_up.dtype).view(spec.experts, -1) for bias in biases)
    )
    x_wide, total_TN = x_TN.to(gate_up.dtype), torch.zeros(x_TN.shape, dtype=torch.float32, device=x_TN.device)
    for expert in range(spec.experts):
        token, choice = (ids_Tk == expert + spec.first).nonzero(as_tuple=True)
        if not len(token):
            continue
        weight = weights_Tk[token, choice].float()[:, None]
        read = x_wide[token] * weight.to(x_wide.dtype) if spec.scale_input else x_wide[token]
        inner = F.linear(read, up_EMN[expert], None if up_bias is None else up_bias[expert])
        inner = activate(inner, spec)
        part = F.linear(inner, down_ENF[expert], None if down_bias is None else down_bias[expert])
        total_TN.index_add_(0, token, part.float() if spec.scale_input else part.float() * weight)
    return total_TN.to(x_TN.dtype)


def activate(x: Tensor, spec: ExpertSpec) -> Tensor:
    """[.., 2F] -> [.., F], or without gate [.., F] -> [.., F]."""
    if spec.activation == "swiglu_clamp":
        gate, up = x.chunk(2, -1)
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * spec.alpha))
    acts: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh, "relu2": relu2}
    act = acts[spec.activation]
    if not spec.gated:
        return act(x)
    gate, up = x.chunk(2, -1)
    return act(gate) * up


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """The exact one, with the error function."""
    return F.gelu(x)


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def relu2(x: Tensor) -> Tensor:
    """The square of what is above 0."""
    return F.relu(x).square()


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
    """The activation of Huang et al. (2024): a square right of 0 and an exponential left of it, each with a learned
    strength; float32 [1] numbers beside x."""
    wide = x.float()
    left = torch.expm1(wide.minimum(eps)) - wide
    curved = torch.where(wide > 0, F.softplus(alpha_p) * wide.square(), (beta + F.softplus(alpha_n)) * left)
    return (curved + beta * wide).to(x.dtype)


def join(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat((x, y), -1)


def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate), of one shape, or one number of the gate for each row."""
    return x * torch.sigmoid(gate)


def scale(x: Tensor, factor: float) -> Tensor:
    """x * factor."""
    return x * factor


def scale_rows(x_TN: Tensor, scale_T: Tensor) -> Tensor:
    """Each row times its own number."""
    return (x_TN.float() * scale_T.float().view(-1, *[1] * (x_TN.ndim - 1))).to(x_TN.dtype)


def clip(x: Tensor, limit: float) -> Tensor:
    return x.clamp(-limit, limit)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al., 2016)."""
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (wide if bias is None else wide + bias.float()).to(x.dtype)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, group: int = 0, norm_first: bool = False
) -> Tensor:
    """RMS norm of x gated by silu(gate). `group`: norms over groups of so many of the last axis; 0: over all of it.

    `norm_first` False: norm(x * silu(gate)) (Mamba 2); True: norm(x) * silu(gate) (gated delta nets).
    """
    wide, open_ = x.float(), F.silu(gate.float())
    wide = wide if norm_first else wide * open_
    groups = wide.unflatten(-1, (-1, group or x.shape[-1]))
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    wide = groups.flatten(-2) * weight.float()
    return (wide * open_ if norm_first else wide).to(x.dtype)


def mrope_table(
    positions_3T: Tensor, cos_sin: Tensor, sections: tuple[int, ...], interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotation by three positions (time, height, width): (0..T-1, [T, 2, rotary / 2]), a table with a row per token.

    Pair i of a head turns by the axis that `sections` gives it: the first sections[0] pairs by time, the next by
    height, the rest by width; interleaved: height has pairs 1, 4, 7, .. up to 3 * sections[1], width 2, 5, 8, .., time
    the others.
    """
    half = cos_sin.shape[-1]
    if interleaved:
        axis = torch.zeros(half, dtype=torch.int64)
        for number in (1, 2):
            axis[number : 3 * sections[number] : 3] = number
    else:
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    rows_T2h = cos_sin[positions_3T].permute(1, 2, 3, 0)  # [T, 2, half, 3]
    pick = axis.to(cos_sin.device).view(1, 1, half, 1).expand(*rows_T2h.shape[:3], 1)
    return torch.arange(positions_3T.shape[1], device=cos_sin.device), rows_T2h.gather(3, pick).squeeze(3).contiguous()


def index_scores(q_THD: Tensor, k_LD: Tensor, weights_TH: Tensor) -> Tensor:
    """Of a sparse attention's indexer: sum over heads of weight * relu(q . k), float32 [T, L]."""
    dots_THL = torch.einsum("thd,ld->thl", q_THD.float(), k_LD.float())
    return torch.einsum("thl,th->tl", dots_THL.relu(), weights_TH.float())


def topk_indices(scores_TL: Tensor, lengths_T: Tensor, k: int) -> Tensor:
    """The k best keys of each token among its first lengths_T, best first, the lowest of equals; int32 [T, k].

    Tokens with fewer keys have -1 behind them.
    """
    unseen = torch.arange(scores_TL.shape[1], device=scores_TL.device) >= lengths_T[:, None]
    ranked = scores_TL.float().masked_fill(unseen, float("-inf")).sort(dim=-1, descending=True, stable=True)[1]
    ids = F.pad(ranked[:, :k], (0, max(0, k - ranked.shape[1])), value=-1)
    return ids.masked_fill(torch.arange(k, device=ids.device) >= lengths_T[:, None], -1).to(torch.int32)
