"""Products, norms, positions and scans in plain torch: the specification that native and Triton kernels meet.

Beside it `reference_attention`, `reference_experts`, `reference_sampling` and `reference_formats`; `compose.py` makes a
linear layer of its parts. Legend as in `ops.py`. Reductions are done in float32 whatever the input type; results have
the input's type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kernels.calls import Adapters, WeightSource


def prepare_linear(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> Tensor:
    dense = [part.dense(dtype) for part in parts]
    return (dense[0] if len(dense) == 1 else torch.cat(dense)).to(device)


def product(x_TN: Tensor, weight_MN: Tensor, bias_M: Tensor | None) -> Tensor:
    return F.linear(x_TN, weight_MN, bias_M)


def add_adapters(y_TM: Tensor, x_TN: Tensor, adapters: Adapters) -> Tensor:
    """factor * (y + (x downT) up) + shift by each token's own adapter; 0 changes nothing."""
    out, ends = y_TM.clone(), adapters.ends.tolist()
    for entry in sorted(set(adapters.index.tolist()) - {0}):
        rank, more = adapters.facts[entry].tolist()
        if not rank and not more:
            continue
        rows = (adapters.index == entry).nonzero().squeeze(1)
        x, y = x_TN[rows].float(), y_TM[rows].float()
        for part, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            small = x @ adapters.down[entry, part, :rank].float().T
            y[:, begin:end] += small @ adapters.up[entry, :rank, begin:end].float()
        if more:
            y = adapters.factor[entry] * y + adapters.shift[entry]
        out[rows] = y.to(out.dtype)
    return out


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
