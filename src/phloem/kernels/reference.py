"""Every op in plain torch: the specification that native and Triton kernels are compared with.

Legend as in `ops.py`. Reductions are done in float32 whatever the input type; results have the input's type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kernels.ops import PagedBatch, WeightSource


def prepare_linear(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> Tensor:
    dense = [part.dense(dtype) for part in parts]
    return (dense[0] if len(dense) == 1 else torch.cat(dense)).to(device)


def linear(x_TN: Tensor, weight_MN: Tensor, bias_M: Tensor | None) -> Tensor:
    return F.linear(x_TN, weight_MN, bias_M)


def embedding(ids_T: Tensor, weight_VN: Tensor, scale: float) -> Tensor:
    rows = F.embedding(ids_T, weight_VN)
    # The scale is rounded to the weights' type first, as the models that have one were trained.
    return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype, device=rows.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def softcap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def rope_(q_THD: Tensor, k_TKD: Tensor, positions_T: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    cos, sin = cos_sin[positions_T].unsqueeze(2).unbind(1)  # [T, 1, rotary / 2] each
    half = cos.shape[-1]
    for x in (q_THD, k_TKD):
        turned = x[..., : 2 * half]
        pairs = turned.float().unflatten(-1, (half, 2) if interleaved else (2, half))
        first, second = pairs.unbind(-1 if interleaved else -2)
        out = torch.stack((first * cos - second * sin, second * cos + first * sin), -1 if interleaved else -2)
        turned.copy_(out.flatten(-2))


def write_kv(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor) -> None:
    size = k_cache.shape[2]
    page, offset = slots_T // size, slots_T % size
    k_cache[page, :, offset] = k_TKD.to(k_cache.dtype)
    v_cache[page, :, offset] = v_TKD.to(v_cache.dtype)


def paged_attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int,
    cap: float,
    sinks_H: Tensor | None,
) -> Tensor:
    """Causal attention of new tokens over their row's pages, one row after another.

    With a window w a token sees itself and the w - 1 before it. A sink is a logit per head that takes part in the
    softmax and contributes no value.
    """
    out = torch.empty_like(q_THD)
    starts = batch.query_start.tolist()
    for row, length in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        out[begin:end] = _attend_row(
            q_THD[begin:end], k_cache, v_cache, batch.page_table[row], length, scale, window, cap, sinks_H
        )
    return out


def _attend_row(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    length: int,
    scale: float,
    window: int,
    cap: float,
    sinks_H: Tensor | None,
) -> Tensor:
    size = k_cache.shape[2]
    used = pages[: (length + size - 1) // size].long()
    tokens, heads = q_THD.shape[:2]
    group = heads // k_cache.shape[1]
    k_HLD = k_cache[used].transpose(0, 1).flatten(1, 2)[:, :length].float().repeat_interleave(group, 0)
    v_HLD = v_cache[used].transpose(0, 1).flatten(1, 2)[:, :length].float().repeat_interleave(group, 0)
    if window:
        # Behind the window the table may name the scratch page, and a weight of 0 takes no NaN away.
        behind = max(0, length - tokens - window + 1)
        k_HLD[:, :behind], v_HLD[:, :behind] = 0, 0
    scores_HTL = torch.einsum("thd,hld->htl", q_THD.float(), k_HLD) * scale
    if cap:
        scores_HTL = softcap(scores_HTL, cap)
    behind_TL = torch.arange(length - tokens, length, device=pages.device)[:, None] - torch.arange(
        length, device=pages.device
    )
    hidden_TL = behind_TL < 0
    if window:
        hidden_TL |= behind_TL >= window
    scores_HTL.masked_fill_(hidden_TL, float("-inf"))
    if sinks_H is not None:
        column = sinks_H.float()[:, None, None].expand(-1, tokens, 1)
        weights = torch.cat((scores_HTL, column), -1).softmax(-1)[..., :-1]
    else:
        weights = scores_HTL.softmax(-1)
    return torch.einsum("htl,hld->thd", weights, v_HLD).to(q_THD.dtype)


def argmax(logits_LV: Tensor) -> Tensor:
    return logits_LV.argmax(-1).to(torch.int32)


def logsumexp(logits_LV: Tensor) -> Tensor:
    return logits_LV.float().logsumexp(-1)


def top_k(logits_LV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = logits_LV.topk(k, dim=-1)
    return values, ids.to(torch.int32)


def mask_tokens_(logits_LV: Tensor, rows_M: Tensor, mask_MW: Tensor) -> None:
    bits_MV = (mask_MW.unsqueeze(-1) >> torch.arange(32, device=mask_MW.device)) & 1
    forbidden_MV = torch.ones(len(rows_M), logits_LV.shape[1], dtype=torch.bool, device=logits_LV.device)
    covered = min(bits_MV.shape[1] * 32, logits_LV.shape[1])
    forbidden_MV[:, :covered] = bits_MV.flatten(1)[:, :covered] == 0
    for row, forbidden_V in zip(rows_M.tolist(), forbidden_MV, strict=True):
        logits_LV[row].masked_fill_(forbidden_V, float("-inf"))
