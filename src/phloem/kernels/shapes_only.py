"""Ops that read values, as functions that tell of their results' shapes alone: for a forward pass without data.

The table's defaults are plain torch code and launch no kernel that is compiled, so what they compute does not matter to
whoever wants to know which kernels a step launches. But some of them go through values on the host, which tensors
without data do not have. Legend as in `ops.py`.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels.ops import Ops

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels.calls import AttentionCall, Cache, IndexCall, LatentCall, PagedBatch


def _like_first(x: Tensor, *rest: Any) -> Tensor:
    del rest
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _scan(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """A recurrence: results like its inputs, and the states (the argument before `query_start`)."""
    return _like_first(x), _like_first(rest[-2])


def _gated_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, *rest: Any) -> Any:
    del k, decay, beta, rest
    heads = (v.shape[1], v.shape[2])
    return torch.empty((q.shape[0], *heads), dtype=v.dtype, device=v.device), _like_first(state)


def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    del weight, bias, rest
    return _like_first(x), _like_first(state)


def _attention(q_THD: Tensor, cache: Cache, batch: PagedBatch, call: AttentionCall) -> Tensor:
    del batch, call
    return torch.empty((*q_THD.shape[:2], cache[1].shape[3]), dtype=q_THD.dtype, device=q_THD.device)


def _packed(q_THD: Tensor, k_TKD: Tensor, v_TKV: Tensor, *rest: Any) -> Tensor:
    del k_TKD, rest
    return torch.empty((*q_THD.shape[:2], v_TKV.shape[2]), dtype=q_THD.dtype, device=q_THD.device)


def _latent(q_THN: Tensor, q_rope: Tensor, cache: Tensor, batch: PagedBatch, call: LatentCall, *rest: Any) -> Tensor:
    del q_rope, cache, batch, rest
    return torch.empty((*q_THN.shape[:2], call.w_uv.shape[2]), dtype=q_THN.dtype, device=q_THN.device)


def _choose_keys(call: IndexCall, cache: Tensor, batch: PagedBatch) -> Tensor:
    del cache, batch
    return torch.empty((call.q.shape[0], call.count), dtype=torch.int32, device=call.q.device)


_FORMS: dict[str, Any] = {
    "experts": _like_first,
    "chosen_experts": _like_first,
    "moe": _like_first,
    "mamba2_scan": _scan,
    "selective_scan": _scan,
    "gated_delta": _gated_delta,
    "causal_conv": _causal_conv,
    "paged_attention": _attention,
    "packed_attention": _packed,
    "latent_attention": _latent,
    "chosen_latent_attention": _latent,
    "choose_keys": _choose_keys,
}


def reads_values(ops: Ops, name: str) -> bool:
    """Whether this op of the table is plain torch code that goes through values on the host: no recording on a device
    holds that."""
    plain = {field.name: field.default for field in fields(Ops)}
    return name in _FORMS and getattr(ops, name) is plain[name]


def shapes_only(ops: Ops) -> Ops:
    """The table, whose ops of plain torch that would read values give empty results instead."""
    return replace(ops, **{name: form for name, form in _FORMS.items() if reads_values(ops, name)})
