"""Attention over pages in plain torch, one row after another. Legend as in `ops.py`; L cached tokens of a row.

Latents (MLA): L latent size, P rotated part, N and D sizes of a head's keys (but for that part) and values.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phloem.kernels.reference import softcap
from phloem.kernels.reference_models import index_scores, topk_indices

if TYPE_CHECKING:
    from phloem.kernels.calls import AttentionCall, Cache, IndexCall, LatentCall, PagedBatch


def paged_attention(
    q_THD: Tensor,
    cache: Cache,
    batch: PagedBatch,
    call: AttentionCall,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    tree_mask: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens over their row's pages, [T, H, value size].

    `scales` [1] or [K]: what the cached keys and values are to be multiplied with. `tree_mask` [T, max_query_len] says
    which of its row's new tokens a new token sees, in place of the order among them (draft trees).
    """
    k_cache, v_cache = cache
    out = torch.empty((*q_THD.shape[:2], v_cache.shape[3]), dtype=q_THD.dtype, device=q_THD.device)
    group = q_THD.shape[1] // k_cache.shape[1]
    starts = batch.query_start.tolist()
    for row, length in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        pages = batch.page_table[row, : -(-length // k_cache.shape[2])].long()
        k_KLD, v_KLD = (cached[pages].transpose(0, 1).flatten(1, 2)[:, :length].float() for cached in cache)
        if scales is not None:
            k_KLD, v_KLD = k_KLD * scales[0].reshape(-1, 1, 1), v_KLD * scales[1].reshape(-1, 1, 1)
        seen_TL = visible(end - begin, length, call, q_THD.device)
        # What nobody sees may be a page that was given back: a weight of 0 takes no NaN away.
        v_KLD = v_KLD.masked_fill(~seen_TL.any(0)[:, None], 0.0)
        if tree_mask is not None:
            seen_TL[:, length - (end - begin) :] &= tree_mask[begin:end, : end - begin].bool()
        weights_HTL = _weights(q_THD[begin:end], k_KLD.repeat_interleave(group, 0), seen_TL, call)
        values = torch.einsum("htl,hld->thd", weights_HTL, v_KLD.repeat_interleave(group, 0))
        out[begin:end] = values.to(q_THD.dtype)
    return out


def packed_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKV: Tensor,
    starts: Tensor,
    call: AttentionCall,
    distances: Tensor | None = None,
) -> Tensor:
    """As `ops.PackedAttentionOp`: attention of whole texts, one after another."""
    out = torch.empty((*q_THD.shape[:2], v_TKV.shape[2]), dtype=q_THD.dtype, device=q_THD.device)
    group = q_THD.shape[1] // k_TKD.shape[1]
    for begin, end in pairwise(starts.tolist()):
        k_HLD, v_HLV = (x[begin:end].transpose(0, 1).float().repeat_interleave(group, 0) for x in (k_TKD, v_TKV))
        seen_TL = visible(end - begin, end - begin, call, q_THD.device)
        bias_HTL = None if distances is None else by_distance(distances, end - begin)
        weights_HTL = _weights(q_THD[begin:end], k_HLD, seen_TL, call, bias_HTL)
        out[begin:end] = torch.einsum("htl,hlv->thv", weights_HTL, v_HLV).to(q_THD.dtype)
    return out


def by_distance(distances: Tensor, length: int) -> Tensor:
    """[H, 2 M - 1] -> [H, L, L]: of key j behind query i the entry of j - i."""
    middle = distances.shape[1] // 2
    at = torch.arange(length, device=distances.device)
    return distances[:, at[None, :] - at[:, None] + middle]


def visible(tokens: int, length: int, call: AttentionCall, device: torch.device) -> Tensor:
    """Which of a row's `length` positions each of its last `tokens` sees, bool [T, L]."""
    here_T1 = torch.arange(length - tokens, length, device=device)[:, None]
    there_L = torch.arange(length, device=device)
    # The last position that a token sees, and how far back and ahead.
    last_T1 = here_T1
    if call.block:
        last_T1 = (here_T1 // call.block + 1) * call.block - 1
    if not call.causal:
        last_T1 = torch.full_like(here_T1, length - 1)
    seen_TL = there_L <= last_T1
    if call.window:
        seen_TL = seen_TL & (here_T1 - there_L < call.window)
        if not call.causal:
            seen_TL = seen_TL & (there_L - here_T1 < call.window)
    if call.chunk:
        seen_TL = seen_TL & (here_T1 // call.chunk == there_L // call.chunk)
    return seen_TL


def _weights(
    q_THD: Tensor, k_HLD: Tensor, seen_TL: Tensor, call: AttentionCall, bias_HTL: Tensor | None = None
) -> Tensor:
    """Softmax weights [H, T, L], float32. The bias is added behind the soft cap."""
    scores_HTL = torch.einsum("thd,hld->htl", q_THD.float(), k_HLD) * call.scale
    if call.softcap:
        scores_HTL = softcap(scores_HTL, call.softcap)
    if bias_HTL is not None:
        scores_HTL = scores_HTL + bias_HTL.float()
    scores_HTL.masked_fill_(~seen_TL, float("-inf"))
    if call.sinks is None:
        return scores_HTL.softmax(-1)
    column = call.sinks.float()[:, None, None].expand(-1, len(q_THD), 1)
    return torch.cat((scores_HTL, column), -1).softmax(-1)[..., :-1]


def write_latent(latent_TC: Tensor, cache: Tensor, slots_T: Tensor) -> None:
    """Put the new tokens' latents, with their rotated part behind them, into `[pages, 1, S, L + P]`. What a cache of
    8 bits cannot hold is cut off."""
    size = cache.shape[2]
    if cache.dtype.itemsize == 1:
        limit = torch.finfo(cache.dtype).max
        latent_TC = latent_TC.clamp(-limit, limit)
    cache[slots_T // size, 0, slots_T % size] = latent_TC.to(cache.dtype)


def choose_keys(call: IndexCall, cache: Tensor, batch: PagedBatch) -> Tensor:
    """Positions that each token attends to, int32 [T, count], -1 behind the last, out of the indexer's keys
    `[pages, 1, S, D]`, in which the new tokens' are already. Of equal scores the lowest positions are chosen; they
    stand best first here, and in whatever order in other tables."""
    starts, parts = batch.query_start.tolist(), list[Tensor]()
    for row, length in enumerate(batch.seq_lens.tolist()):
        span = slice(starts[row], starts[row + 1])
        pages = batch.page_table[row, : -(-length // cache.shape[2])].long()
        keys_LD = cache[pages, 0].flatten(0, 1)[:length]
        scores_TL = index_scores(call.q[span], keys_LD, call.weights[span])
        seen_T = torch.arange(length - len(scores_TL), length, device=cache.device) + 1
        parts.append(topk_indices(scores_TL, seen_T, call.count))
    return torch.cat(parts)


def latent_attention(
    q_nope_THN: Tensor,
    q_rope_THP: Tensor,
    cache: Tensor,
    batch: PagedBatch,
    call: LatentCall,
    chosen_Tk: Tensor | None = None,
) -> Tensor:
    """MLA as its paper writes it: keys and values are expanded from the latents, nothing is absorbed. [T, H, D].
    `chosen_Tk`: the positions that each token attends to, as `choose_keys` gives them; None: all up to its own."""
    latent = call.w_uk.shape[2]
    starts = batch.query_start.tolist()
    parts: list[Tensor] = []
    for row, length in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        pages = batch.page_table[row, : -(-length // cache.shape[2])].long()
        tokens_LC = cache[pages, 0].flatten(0, 1)[:length].float()
        k_HLN = torch.einsum("lc,hnc->hln", tokens_LC[:, :latent], call.w_uk.float())
        v_HLD = torch.einsum("lc,hcd->hld", tokens_LC[:, :latent], call.w_uv.float())
        scores = torch.einsum("thn,hln->htl", q_nope_THN[begin:end].float(), k_HLN)
        turned = torch.einsum("thp,lp->htl", q_rope_THP[begin:end].float(), tokens_LC[:, latent:])
        scores = (scores + turned) * call.scale
        here = torch.arange(length - (end - begin), length, device=cache.device)[:, None]
        scores.masked_fill_(here < torch.arange(length, device=cache.device), float("-inf"))
        if chosen_Tk is not None:
            seen_TL = torch.zeros(end - begin, length + 1, dtype=torch.bool, device=cache.device)
            chosen = chosen_Tk[begin:end].long()
            seen_TL.scatter_(1, torch.where(chosen < 0, length, chosen), True)
            scores.masked_fill_(~seen_TL[:, :length], float("-inf"))
        parts.append(torch.einsum("htl,hld->thd", scores.softmax(-1), v_HLD).to(q_nope_THN.dtype))
    return torch.cat(parts)
