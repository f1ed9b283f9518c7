"""Pictures whose tokens see each other both ways: what the layers' attention gave for them is computed once more.

The step's own attention has written the keys and values of all new tokens; a picture's tokens then attend over their
row's pages up to the picture's end. All of it is in the step (`scheduler.state.Request.whole`), or was computed so
once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phloem.attention._store import call_of
from phloem.kernels.calls import PagedBatch
from phloem.kernels.reference_attention import paged_attention

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.attention import Memory
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, AttentionStep, Heads


@dataclass(slots=True)
class Spans:
    """The pictures of a step, one behind the other: S of them, with n of its tokens."""

    index: Tensor  # [n] int64: among the step's tokens
    rows: Tensor  # [S] int64: of the step
    starts: Tensor  # [S + 1] int32: where each begins in `index`
    ends: Tensor  # [S] int32: where each ends in its row's text
    longest: int  # new tokens of one
    farthest: int  # the last of `ends`


class SpanStep:
    """Around a step's attention over one group of pages."""

    def __init__(self, inner: AttentionStep, ops: Ops, pool: KVPool, batch: PagedBatch, spans: Spans) -> None:
        self._inner, self._ops, self._pool, self._index = inner, ops, pool, spans.index
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
        call = call_of(replace(spec, causal=False), heads.sinks)
        cache = self._pool.keys[spec.pool], self._pool.values[spec.pool]
        out[self._index] = paged_attention(q, cache, self._batch, call).to(out.dtype)
        return out


def both_ways(memory: Memory, ops: Ops, spans: Spans) -> Memory:
    """The step's memory, for pictures that see themselves whole."""
    steps = [
        SpanStep(step, ops, memory.pool, batch, spans) if isinstance(batch, PagedBatch) and callable(step) else step
        for step, batch in zip(memory.steps, memory.batches, strict=True)
    ]
    return replace(memory, steps=steps)
