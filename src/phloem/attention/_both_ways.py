"""Pictures whose tokens see each other both ways: what the layers' attention gave for them is computed once more.

The step's own attention has written the keys and values of all new tokens; a picture's tokens then attend over their
row's pages up to the picture's end. All of it is in the step (`scheduler.state.Request.whole`), or was computed so
once. A canvas that is drawn anew (`engine.canvases.refill`) sees itself so too, and of the text before it what its
first token sees.

Legend: H query heads, K kv heads, D head size, C tokens of a canvas, L keys that it sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from phloem.attention._store import call_of
from phloem.kernels.calls import PagedBatch
from phloem.kernels.ops import Ops
from phloem.kernels.reference_attention import paged_attention
from phloem.kernels.shapes_only import shapes_only

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.attention import Memory
    from phloem.kernels.calls import Cache
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, AttentionStep, Heads


_WITHOUT_DATA = shapes_only(Ops()).paged_attention


@dataclass(slots=True)
class Spans:
    """The pictures of a step, one behind the other: S of them, with n of its tokens."""

    index: Tensor  # [n] int64: among the step's tokens
    rows: Tensor  # [S] int64: of the step
    starts: Tensor  # [S + 1] int32: where each begins in `index`
    ends: Tensor  # [S] int32: where each ends in its row's text
    longest: int  # new tokens of one
    farthest: int  # the last of `ends`
    canvases: bool = False  # they are canvases


class SpanStep:
    """Around a step's attention over one group of pages."""

    def __init__(self, inner: AttentionStep, ops: Ops, pool: KVPool, batch: PagedBatch, spans: Spans) -> None:
        self._inner, self._ops, self._pool, self._index = inner, ops, pool, spans.index
        self._canvases = spans.canvases
        table = batch.page_table[spans.rows]
        sizes = spans.longest, spans.farthest
        self._batch = PagedBatch(spans.starts, spans.ends, table, spans.index, *sizes)

    def __call__(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        q = heads.q[self._index].clone()  # before the step's attention uses it up
        rotation = heads.rotation
        if rotation is not None:
            if rotation.q_norm is not None:
                q = self._ops.rms_norm(q, rotation.q_norm, rotation.eps)
            self._ops.rope_(q, q[:, :0], rotation.positions[self._index], rotation.cos_sin, rotation.interleaved)
        out = self._inner(spec, heads)
        cache = self._pool.keys[spec.pool], self._pool.values[spec.pool]
        if self._canvases:
            out[self._index] = canvas_attention(q, cache, self._batch, spec.window, spec.scale).to(out.dtype)
            return out
        call = call_of(replace(spec, causal=False), heads.sinks)
        plain = _WITHOUT_DATA if q.is_meta else paged_attention
        out[self._index] = plain(q, cache, self._batch, call).to(out.dtype)
        return out


def canvas_attention(q_nHD: Tensor, cache: Cache, batch: PagedBatch, window: int, scale: float) -> Tensor:
    """Attention of canvases, the last tokens of their rows, to their own tokens and the `window` - 1 before them (0:
    all); [n, H, value size]. In float32, of floating caches."""
    starts, ends, size = batch.query_start.tolist(), batch.seq_lens.tolist(), cache[0].shape[2]
    share = q_nHD.shape[1] // cache[0].shape[1]
    out: list[Tensor] = []
    for row, end in enumerate(ends):
        q_HCD = q_nHD[starts[row] : starts[row + 1]].float().transpose(0, 1)
        first = max(0, end - q_HCD.shape[1] - window + 1) if window else 0
        pages = batch.page_table[row, first // size : -(-end // size)].long()
        skipped = first % size
        kept = slice(skipped, skipped + end - first)
        k_KLD, v_KLD = (one[pages].transpose(0, 1).flatten(1, 2)[:, kept].float() for one in cache)
        k_HLD, v_HLD = k_KLD.repeat_interleave(share, 0), v_KLD.repeat_interleave(share, 0)
        out.append(F.scaled_dot_product_attention(q_HCD, k_HLD, v_HLD, scale=scale).transpose(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def both_ways(memory: Memory, ops: Ops, spans: Spans) -> Memory:
    """The step's memory, for pictures that see themselves whole."""
    steps = [
        SpanStep(step, ops, memory.pool, batch, spans) if isinstance(batch, PagedBatch) and callable(step) else step
        for step, batch in zip(memory.steps, memory.batches, strict=True)
    ]
    return replace(memory, steps=steps)
