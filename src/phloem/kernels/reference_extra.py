"""Plain torch of the kernels that have no field in the op table: the specification they are compared with.

Legend as in `kernels/ops.py`; A adapters, r rank, E experts, k choices. Reductions in float32 (sampling in float64).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.kernels.reference import prepare_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kernels.ops import PagedBatch, WeightSource

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


def attention_rows(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks_H: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    tree_mask: Tensor | None = None,
) -> Tensor:
    """Paged attention with everything optional: float8 caches with scales, and draft trees."""
    k_wide, v_wide = k_cache.float(), v_cache.float()
    if scales is not None:
        k_wide, v_wide = k_wide * scales[0].reshape(-1, 1, 1), v_wide * scales[1].reshape(-1, 1, 1)
    starts = batch.query_start.tolist()
    out = torch.empty(*q_THD.shape[:2], v_cache.shape[3], dtype=q_THD.dtype, device=q_THD.device)
    group = q_THD.shape[1] // k_cache.shape[1]
    for row, length in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        tokens = end - begin
        pages = batch.page_table[row, : -(-length // k_cache.shape[2])].long()
        k_HLD = k_wide[pages].transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, 0)
        v_HLD = v_wide[pages].transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, 0)
        scores_HTL = torch.einsum("thd,hld->htl", q_THD[begin:end].float(), k_HLD) * scale
        if cap:
            scores_HTL = torch.tanh(scores_HTL / cap) * cap
        here = torch.arange(length - tokens, length, device=q_THD.device)[:, None]
        behind_TL = here - torch.arange(length, device=q_THD.device)
        seen_TL = behind_TL >= 0
        if tree_mask is not None:
            drafted = tree_mask[begin:end, :tokens].bool()
            seen_TL = torch.cat((torch.ones_like(seen_TL[:, : length - tokens]), drafted), 1)
        if window:
            seen_TL = seen_TL & (behind_TL < window)
        scores_HTL.masked_fill_(~seen_TL, float("-inf"))
        if sinks_H is not None:
            column = sinks_H.float()[:, None, None].expand(-1, tokens, 1)
            weights = torch.cat((scores_HTL, column), -1).softmax(-1)[..., :-1]
        else:
            weights = scores_HTL.softmax(-1)
        out[begin:end] = torch.einsum("htl,hld->thd", weights, v_HLD).to(out.dtype)
    return out


def mla_attention(
    q_nope_THN: Tensor,
    q_rope_THP: Tensor,
    cache: Tensor,
    batch: PagedBatch,
    w_uk_HNL: Tensor,
    w_uv_HLD: Tensor,
    scale: float,
) -> Tensor:
    """MLA as its paper writes it: keys and values are expanded from the latents, nothing is absorbed."""
    latent = w_uk_HNL.shape[2]
    starts = batch.query_start.tolist()
    parts: list[Tensor] = []
    for row, length in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        pages = batch.page_table[row, : -(-length // cache.shape[2])].long()
        tokens_LC = cache[pages, 0].flatten(0, 1)[:length].float()
        k_HLN = torch.einsum("lc,hnc->hln", tokens_LC[:, :latent], w_uk_HNL.float())
        v_HLD = torch.einsum("lc,hcd->hld", tokens_LC[:, :latent], w_uv_HLD.float())
        scores = torch.einsum("thn,hln->htl", q_nope_THN[begin:end].float(), k_HLN)
        scores = (scores + torch.einsum("thp,lp->htl", q_rope_THP[begin:end].float(), tokens_LC[:, latent:])) * scale
        here = torch.arange(length - (end - begin), length, device=cache.device)[:, None]
        scores.masked_fill_(here < torch.arange(length, device=cache.device), float("-inf"))
        parts.append(torch.einsum("htl,hld->thd", scores.softmax(-1), v_HLD).to(q_nope_THN.dtype))
    return torch.cat(parts)


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


def sample(
    logits_LV: Tensor,
    temperature_L: Tensor,
    top_k_L: Tensor,
    top_p_L: Tensor,
    min_p_L: Tensor,
    seeds_L: Tensor,
    positions_L: Tensor,
) -> Tensor:
    """Row by row: greedy, or the draw inverted through the kept weights in token-id order."""
    tokens: list[int] = []
    for row, logits_V in enumerate(logits_LV):
        if float(temperature_L[row]) <= 0 or int(top_k_L[row]) == 1:
            tokens.append(int(logits_V.argmax()))
            continue
        weights_V = kept_tokens(
            logits_V, float(temperature_L[row]), int(top_k_L[row]), float(top_p_L[row]), float(min_p_L[row])
        )
        sums_V = weights_V.cumsum(-1)
        target = uniform(int(seeds_L[row]) & _MASK64, int(positions_L[row])) * sums_V[-1]
        tokens.append(int(torch.searchsorted(sums_V, target, right=True)))
    return torch.tensor(tokens, dtype=torch.int32, device=logits_LV.device)


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


def quantise_fp8(x_TN: Tensor, dtype: torch.dtype, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Values and float32 scales per token (group None: scales [T]) or per token and group ([T, N / group])."""
    limit = torch.finfo(dtype).max
    width = group or x_TN.shape[1]
    padded = F.pad(x_TN.float(), (0, -x_TN.shape[1] % width)).unflatten(1, (-1, width))
    scale = padded.abs().amax(-1).clamp_min(1e-10) / limit
    values = (padded / scale.unsqueeze(-1)).clamp(-limit, limit).to(dtype).flatten(1)[:, : x_TN.shape[1]]
    return values, scale if group else scale[:, 0]


def quantise_int8(x_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Values and float32 scales per token, symmetric, to nearest even."""
    scale = x_TN.float().abs().amax(-1).clamp_min(1e-10) / 127.0
    return (x_TN.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantise_blocks(weight_MN: Tensor, dtype: torch.dtype, block: int = 128) -> tuple[Tensor, Tensor]:
    """A weight [..., M, N] in float8 with one float32 scale per block x block, [..., M / block, N / block]."""
    rows, cols = weight_MN.shape[-2:]
    padded = F.pad(weight_MN.float(), (0, -cols % block, 0, -rows % block))
    tiles = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    limit = torch.finfo(dtype).max
    scale = tiles.abs().amax((-3, -1)).clamp_min(1e-10) / limit
    values = (tiles / scale[..., :, None, :, None]).clamp(-limit, limit).to(dtype)
    return values.flatten(-2).flatten(-3, -2)[..., :rows, :cols].contiguous(), scale


def spread_blocks(values_MN: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    """What `quantise_blocks` stands for, in float32."""
    rows, cols = values_MN.shape[-2:]
    spread = scale.repeat_interleave(block, -2)[..., :rows, :].repeat_interleave(block, -1)[..., :cols]
    return values_MN.float() * spread


def spread_groups(values_TN: Tensor, scale: Tensor, group: int = 128) -> Tensor:
    """Values times their token-and-group scales, in float32."""
    return values_TN.float() * scale.repeat_interleave(group, -1)[:, : values_TN.shape[1]]


def add_lora(
    y_TM: Tensor,
    x_TN: Tensor,
    down_ArN: Tensor,
    up_AMr: Tensor,
    scaling_A: Tensor,
    start_of: Tensor,
    adapter_of: Tensor,
) -> Tensor:
    """y + scaling * (x downT) upT by segments; adapter -1 adds nothing."""
    out = y_TM.clone()
    for segment, adapter in enumerate(adapter_of.tolist()):
        begin, end = int(start_of[segment]), int(start_of[segment + 1])
        if adapter >= 0:
            small = x_TN[begin:end].float() @ down_ArN[adapter].float().T
            extra = small @ up_AMr[adapter].float().T * float(scaling_A[adapter])
            out[begin:end] = (y_TM[begin:end].float() + extra).to(out.dtype)
    return out
