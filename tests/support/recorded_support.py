"""Ops for recordings of whole models on tapes: each row of a step by itself, so that its bits are the same in a step of
any size, and nothing waits for a value where a table of kernels does not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.core.batch import FROM_DEVICE, Admission, Batch
from phloem.core.request import SamplingParams
from phloem.kernels import reference as ref
from phloem.kernels import reference_attention as attention
from phloem.kernels import reference_experts
from phloem.kernels import reference_models as models
from phloem.kernels import reference_scan as scan
from phloem.kernels.calls import AttentionCall, LatentCall, PagedBatch
from phloem.kernels.compose import linear_of
from phloem.kernels.ops import Ops
from phloem.kernels.specs import ExpertSpec
from phloem.kvcache.pool import KVPool

WIDTH = 20  # pages of a row in all steps of these tests


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A matrix library may add in another order for another number of rows; row by row it cannot."""
    rows = [ref.product(x[row : row + 1], weight, bias) for row in range(len(x))]
    return torch.cat(rows) if rows else ref.product(x, weight, bias)


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, spec: ExpertSpec, biases: Any = None
) -> Tensor:
    """Every expert for every token, weighted."""
    assert biases is None and not spec.scale_input
    total = torch.zeros(x.shape, dtype=torch.float32)
    act = each_row(partial(models.activate, spec=spec))
    pairs = zip(gate_up.chunk(spec.experts), down.chunk(spec.experts), strict=True)
    for expert, (wide, narrow) in enumerate(pairs):
        share = (weights * (ids == expert + spec.first)).sum(-1, keepdim=True)
        total = total + by_rows(act(by_rows(x, wide, None)), narrow, None) * share
    return total.to(x.dtype)


def moe(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalise: bool) -> Tensor:
    weights, ids = reference_experts.route(logits, top_k, renormalise)
    return experts(x, ids, weights, gate_up, down, ExpertSpec(logits.shape[1]))


def each_row(op: Any) -> Any:
    """The op, of one row after another: torch's loops round their ends otherwise than their middles."""

    def rows(x: Tensor, *rest: Any) -> Any:
        def part(one: Any, row: int) -> Any:
            # Of the other tensors, those that lie beside x.
            beside = isinstance(one, Tensor) and one.dim() == x.dim() and len(one) == len(x)
            return one[row : row + 1] if beside else one

        found = [op(x[row : row + 1], *(part(one, row) for one in rest)) for row in range(len(x))]
        if not found:
            return op(x, *rest)
        pairs = isinstance(found[0], tuple)
        return tuple(torch.cat(one) for one in zip(*found, strict=True)) if pairs else torch.cat(found)

    return rows


class Ones:
    """Where rows of one token start, without reading it."""

    def __init__(self, rows: int) -> None:
        self._starts = list(range(rows + 1))

    def tolist(self) -> list[int]:
        return self._starts


def _decode(start: Tensor, tokens: int) -> Any:
    """`start`, or what needs no reading in a decode step."""
    return Ones(tokens) if len(start) == tokens + 1 else start


def causal_conv(x: Tensor, weight: Tensor, bias: Any, state: Tensor, start: Tensor, silu: bool = True) -> Any:
    return scan.causal_conv(x, weight, bias, state, _decode(start, len(x)), silu)


def gated_delta(q: Tensor, *rest: Any) -> Any:
    *more, start, scale = rest
    return scan.gated_delta(q, *more, _decode(start, len(q)), scale)


def mamba2_scan(x: Tensor, *rest: Any) -> Any:
    return scan.mamba2_scan(x, *rest[:-1], _decode(rest[-1], len(x)))


def selective_scan(x: Tensor, *rest: Any) -> Any:
    return scan.selective_scan(x, *rest[:-1], _decode(rest[-1], len(x)))


def _seen(batch: PagedBatch, row: int, size: int) -> tuple[Tensor, Tensor]:
    """(All pages of a row of a decode step, which of their places it sees)."""
    pages = F.pad(batch.page_table[row].long(), (0, WIDTH - batch.page_table.shape[1]))
    return pages, torch.arange(WIDTH * size) < batch.seq_lens[row]


def paged_attention(q: Tensor, cache: Any, batch: PagedBatch, call: AttentionCall) -> Tensor:
    if len(q) != len(batch.seq_lens) or call.window or call.sinks is not None or call.softcap:
        return attention.paged_attention(q, cache, batch, call)
    (keys, values), parts = cache, list[Tensor]()
    share = q.shape[1] // keys.shape[1]
    for row in range(len(q)):
        pages, seen = _seen(batch, row, keys.shape[2])
        k, v = (one[pages].transpose(0, 1).flatten(1, 2).repeat_interleave(share, 0) for one in (keys, values))
        scores = torch.einsum("hd,hld->hl", q[row], k) * call.scale
        parts.append(torch.einsum("hl,hld->hd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.stack(parts)


def latent_attention(q_nope: Tensor, q_rope: Tensor, cache: Tensor, batch: PagedBatch, call: LatentCall) -> Tensor:
    if len(q_nope) != len(batch.seq_lens):
        return attention.latent_attention(q_nope, q_rope, cache, batch, call)
    rank, parts = call.w_uk.shape[2], list[Tensor]()
    for row in range(len(q_nope)):
        pages, seen = _seen(batch, row, cache.shape[2])
        kept = cache[pages, 0].flatten(0, 1)
        low = torch.einsum("hn,hnc->hc", q_nope[row], call.w_uk)
        scores = (low @ kept[:, :rank].T + q_rope[row] @ kept[:, rank:].T) * call.scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hc,hcd->hd", weights @ kept[:, :rank], call.w_uv))
    return torch.stack(parts)


# As of a device's table: its decode steps read nothing, ...
ROWS = ("rms_norm", "add_rms_norm", "layer_norm", "gated_rms_norm", "silu_and_mul", "gelu_tanh_and_mul", "sigmoid_mul",
        "step_sizes", "delta_gates", "gelu", "gelu_tanh", "relu2", "route")  # fmt: skip
OPS = replace(
    Ops(), name="rows", **{name: each_row(getattr(Ops(), name)) for name in ROWS}, moe=moe, linear=linear_of(by_rows),
    experts=experts, causal_conv=causal_conv, gated_delta=gated_delta,
    mamba2_scan=mamba2_scan, selective_scan=selective_scan, paged_attention=paged_attention,
    latent_attention=latent_attention,
)  # fmt: skip
# ... or these of them do.
READING = replace(OPS, name="reading", mamba2_scan=scan.mamba2_scan, selective_scan=scan.selective_scan)

PROMPTS = [np.random.default_rng(seed).integers(5, 300, 60).astype(np.int32) for seed in range(3)]
PARAMS = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=0.0)]


def batches(pool: KVPool, *steps: dict[int, int]) -> list[Batch]:
    """Of each step how many tokens each row computes; a row yields when its prompt of 21, 12 or 24 tokens is known."""
    ends, known, admitted = [21, 12, 24], [0, 0, 0], set[int]()
    own, made = np.arange(1, 3 * WIDTH + 1, dtype=np.int32).reshape(3, WIDTH), list[Batch]()
    states = np.array([[1, 2], [3, 4], [5, 6]], np.int32)  # read, written; in turn
    for step in steps:
        order = list(step)
        ids = [
            PROMPTS[row][known[row] : known[row] + new] if known[row] < ends[row] else np.array([FROM_DEVICE], np.int32)
            for row, new in step.items()
        ]
        fresh = [row for row in order if row not in admitted]
        admitted |= set(fresh)
        after = {row: known[row] + new for row, new in step.items()}
        made.append(
            Batch(
                len(made), np.array(order, np.int32), np.array(list(step.values()), np.int32),
                np.array([known[row] for row in order], np.int32), np.concatenate(ids),
                tuple(states[order].copy() if group.kind == "state" else own[order] for group in pool.groups),
                np.array([after[row] >= ends[row] for row in order], np.int32),
                [
                    Admission(row, f"r{row}", PARAMS[row], 7 + row, PROMPTS[row][: ends[row]], ends[row],
                    return_logprob=True, return_hidden=row == 1) for row in fresh
                ],
            )
        )  # fmt: skip
        for row in order:
            known[row] = after[row]
            states[row] = states[row][::-1].copy()
    return made


# Chunked prefill, mixed steps and decode: T = 16, 17, 15, 13, 3, 2, 1.
STEPS: list[dict[int, int]] = [
    {0: 16}, {0: 5, 1: 12}, {0: 1, 1: 1, 2: 13}, {0: 1, 1: 1, 2: 11}, {0: 1, 1: 1, 2: 1}, {0: 1, 2: 1}, {2: 1}
]  # fmt: skip
