"""Attention of whole texts, packed without padding, that keeps nothing: for models that read a text once, for towers
that read pictures (or windows of them) and sounds.

By the table's own op, in one call for texts of all lengths. Where a table has none, or torch is the faster one, rows of
one length are computed together by torch's fused attention, or by the reference where a layer asks more.
Legend: T packed tokens, H query heads, K kv heads, D head size, n rows of one length L.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from phloem.attention._store import call_of
from phloem.kernels.reference_attention import by_distance, packed_attention, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.kernels.calls import LatentCall
    from phloem.kernels.ops import IndexCall, Ops
    from phloem.layers.context import AttentionSpec, Heads, Relative, StateStep

_MOST_LOGITS = 1 << 25  # of rows that are attended to at a time, where distances have logits of their own

# Long texts of one length whose heads are small: torch's fused attention is up to a seventh faster than the native op
# there (AVX2, two threads), which takes 1.0 to 1.8 times its speed at larger heads, windows and texts of many lengths,
# and 20 times and more at short ones.
FUSED_TOKENS, FUSED_HEADS = 256, 64


def refusal(memory: Sequence[object], specs: Sequence[AttentionSpec]) -> str | None:
    """Why a model's layers cannot be computed so, or None."""
    if len(memory) > sum(spec.writes for spec in specs):
        return "it has layers that keep something other than keys and values (recurrent or latent)"
    return None if all(spec.writes for spec in specs) else "it has layers that read what another has written"


class PackedMemory:
    """One step's rows (`layers.context.StepMemory`): each is a whole text. `lengths`: of its texts, in tokens."""

    def __init__(self, ops: Ops, lengths: Sequence[int]) -> None:
        self._ops = ops
        self._own = ops.packed_attention is not packed_attention
        self._starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self._masks: dict[tuple[int, AttentionSpec], Tensor] = {}
        starts: dict[int, list[int]] = {}
        at = 0
        for length in lengths:
            starts.setdefault(length, []).append(at)
            at += length
        self._groups = [(length, _spans(found, length)) for length, found in starts.items()]
        self._even = len(self._groups) == 1 and self._groups[0][0] >= FUSED_TOKENS

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        q_THD, k_TKD, v_TKD = self._turned(heads)
        fused = self._even and spec.values <= FUSED_HEADS and not spec.causal and not spec.window
        own = self._own and heads.relative is None and not fused
        if own or spec.softcap or heads.sinks is not None or spec.block:
            call = call_of(spec, heads.sinks)
            return self._ops.packed_attention(q_THD, k_TKD, v_TKD, self._starts, call, heads.distances)
        if len(self._groups) == 1 and len(self._groups[0][1]) == 1:
            return self._fused(spec, self._groups[0][0], (q_THD, k_TKD, v_TKD), heads)
        out = torch.empty((len(q_THD), spec.heads, spec.values), dtype=q_THD.dtype, device=q_THD.device)
        for length, spans in self._groups:
            parts = [[x[first:last] for first, last in spans] for x in (q_THD, k_TKD, v_TKD)]
            q, k, v = (some[0] if len(some) == 1 else torch.cat(some) for some in parts)
            found, at = self._fused(spec, length, (q, k, v), heads), 0
            for first, last in spans:
                out[first:last] = found[at : at + last - first]
                at += last - first
        return out

    def _fused(self, spec: AttentionSpec, length: int, heads: tuple[Tensor, Tensor, Tensor], asked: Heads) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in heads)
        if asked.relative is not None:
            return _by_relative(spec, asked.relative, q, k, v).transpose(1, 2).contiguous().flatten(0, 1)
        distances = asked.distances
        mask, causal = None, spec.causal and not spec.window and not spec.chunk
        if not causal and (spec.causal or spec.window or spec.chunk):
            mask = self._mask(spec, length, q.device)
        if distances is not None:
            bias = by_distance(distances, length).to(q.dtype)[None]  # [1, H, L, L]
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        grouped = spec.heads != spec.kv_heads
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=spec.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous().flatten(0, 1)

    def _mask(self, spec: AttentionSpec, length: int, device: torch.device) -> Tensor:
        key = length, spec
        if key not in self._masks:
            self._masks[key] = visible(length, length, call_of(spec, None), device)
        return self._masks[key]

    def _turned(self, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        q_THD, k_TKD, rotation = heads.q, heads.k, heads.rotation
        if rotation is not None:
            if rotation.q_norm is not None and rotation.k_norm is not None:
                q_THD = self._ops.rms_norm(q_THD, rotation.q_norm, rotation.eps)
                k_TKD = self._ops.rms_norm(k_TKD, rotation.k_norm, rotation.eps)
            self._ops.rope_(q_THD, k_TKD, rotation.positions, rotation.cos_sin, rotation.interleaved)
        return q_THD, k_TKD, heads.v

    def attend_latent(
        self,
        pool: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        call: LatentCall,
        chosen: Tensor | None = None,
        /,
    ) -> Tensor:
        raise NotImplementedError("latent attention over packed texts")  # `refusal` has told before

    def choose(self, pool: int, call: IndexCall, /) -> Tensor | None:
        raise NotImplementedError("sparse attention over packed texts")

    def keep(self, pool: int, x_TN: Tensor, /) -> None:
        raise NotImplementedError("nothing is kept of packed texts")

    def kept(self, pool: int, /) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("nothing is kept of packed texts")

    def state(self, pool: int) -> StateStep:
        raise NotImplementedError("recurrent layers over packed texts")


def _spans(starts: list[int], length: int) -> list[tuple[int, int]]:
    """Texts of one length that lie one behind the other, as one span."""
    spans: list[tuple[int, int]] = []
    for start in starts:
        if spans and spans[-1][1] == start:
            spans[-1] = spans[-1][0], start + length
        else:
            spans.append((start, start + length))
    return spans


def _by_relative(spec: AttentionSpec, relative: Relative, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, H, L, D] of rows of one length whose logits weigh distances too; so many at a time as the logits allow."""
    count, heads, length, _ = q.shape
    at, middle = torch.arange(length, device=q.device), len(relative.rows) // 2
    index_LL = relative.rows[at[:, None] - at[None, :] + middle]  # of query i behind key j
    widest = max([length, *(len(x[0]) for x in (relative.keys, relative.queries) if x is not None)])
    each = max(1, _MOST_LOGITS // (heads * length * widest))
    parts: list[Tensor] = []
    for first in range(0, count, each):
        q_, k_, v_ = (x[first : first + each] for x in (q, k, v))
        added = q_.new_zeros((len(q_), heads, length, length))
        if relative.keys is not None:
            added += (q_ @ relative.keys.transpose(1, 2)).gather(-1, index_LL.expand(added.shape))
        if relative.queries is not None:
            of_keys = (k_ @ relative.queries.transpose(1, 2)).gather(-1, index_LL.T.expand(added.shape))
            added += of_keys.transpose(2, 3)
        parts.append(F.scaled_dot_product_attention(q_, k_, v_, attn_mask=added * spec.scale, scale=spec.scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
