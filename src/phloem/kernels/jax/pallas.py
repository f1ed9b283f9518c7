"""Attention over pages as a Pallas kernel: pages come one block after another, by tables that are known before they do.

Every call's mask is an interval of positions, [low, high] of each token, so the kernel knows windows, chunks and blocks
by these two alone, and leaves out the pages that no token of a block of queries sees. Softmax runs along with the pages
(online softmax: Milakov and Gimelshein, 2018). Rows of one token, or one row, as in `attention.py`.

Legend as there; K kv heads, G query heads of each, S page size, D and V sizes of keys and values, M queries of a block
(tokens times G).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as Spec

from phloem.kernels.jax.attention import LOW, rows_of
from phloem.kernels.jax.tensor import Array, lift

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.kernels.calls import AttentionCall, PagedBatch

PAGES = 8  # of a step of the kernel: they come side by side, and are multiplied as one matrix
QUERIES = 128  # of a block, at least where a row has so many: the rows of a matrix unit


def spans(here_RQ: Any, lens_R1: Any, call: AttentionCall) -> tuple[Any, Any]:
    """The first and the last position that each token sees, int32 [R, Q] each."""
    low, high = jnp.zeros_like(here_RQ), jnp.broadcast_to(lens_R1 - 1, here_RQ.shape)
    if call.causal:
        last = (here_RQ // call.block + 1) * call.block - 1 if call.block else here_RQ
        high = jnp.minimum(high, last)
    if call.window:
        low = jnp.maximum(low, here_RQ - call.window + 1)
        if not call.causal:
            high = jnp.minimum(high, here_RQ + call.window - 1)
    if call.chunk:
        first = here_RQ // call.chunk * call.chunk
        low, high = jnp.maximum(low, first), jnp.minimum(high, first + call.chunk - 1)
    return low.astype(jnp.int32), high.astype(jnp.int32)


def _kernel(
    table: Any, first: Any, last: Any, q: Any, low: Any, high: Any, *rest: Any,
    size: int, scale: float, softcap: float, sinks: bool,
) -> None:  # fmt: skip
    """One block of pages for one block of queries of one kv head of one row. `first`, `last`: blocks of pages that the
    queries see, by row and block of queries."""
    del table
    sink, rest = (rest[0], rest[1:]) if sinks else (None, rest)
    keys, values, (out, top, total, mixed) = rest[:PAGES], rest[PAGES : 2 * PAGES], rest[2 * PAGES :]
    row, queries, block = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(block == 0)
    def _begin() -> None:
        # A sink is a logit that was there before, and brought no value.
        top[...] = jnp.full_like(top, LOW) if sink is None else jnp.broadcast_to(sink[0], top.shape)
        total[...] = jnp.zeros_like(total) if sink is None else jnp.ones_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when((block >= first[row, queries]) & (block <= last[row, queries]))
    def _mix() -> None:
        q_MD = q[0, 0]
        k_LD = jnp.concatenate([page[0, 0] for page in keys])
        v_LV = jnp.concatenate([page[0, 0] for page in values])
        exact = jax.lax.Precision.HIGHEST if q_MD.dtype == jnp.float32 else None
        dot = partial(jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
        scores = dot(q_MD, k_LD.astype(q_MD.dtype), (((1,), (1,)), ((), ()))) * scale
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        there = block * size + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = (there >= low[0]) & (there <= high[0])
        scores = jnp.where(seen, scores, LOW)
        # What nobody sees may be a page that was given back: a weight of 0 takes no NaN away.
        place = block * size + jax.lax.broadcasted_iota(jnp.int32, v_LV.shape, 0)
        v_LV = jnp.where((place >= jnp.min(low[0])) & (place <= jnp.max(high[0])), v_LV, jnp.zeros_like(v_LV))
        before = top[:, :1]
        best = jnp.maximum(before, scores.max(1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - best), 0.0)
        fade = jnp.exp(before - best)
        summed = total[:, :1] * fade + weights.sum(1, keepdims=True)
        mixed[...] = mixed[...] * fade + dot(
            weights.astype(q_MD.dtype), v_LV.astype(q_MD.dtype), (((1,), (0,)), ((), ()))
        )
        top[...] = jnp.broadcast_to(best, top.shape)
        total[...] = jnp.broadcast_to(summed, total.shape)

    @pl.when(block == pl.num_programs(3) - 1)
    def _end() -> None:
        whole = total[:, :1]  # 0 behind the last token of a padded step
        out[0, 0] = (mixed[...] / jnp.where(whole == 0.0, 1.0, whole)).astype(out.dtype)


def _page(number: int, blocks: int) -> Callable[..., tuple[Any, ...]]:
    """Which page is the `number`th of a block. One that is not wanted is the nearest that is: it is there already."""

    def index(row: Any, head: Any, queries: Any, block: Any, table: Any, first: Any, last: Any) -> tuple[Any, ...]:
        wanted = jnp.clip(block, first[row, queries], jnp.maximum(first[row, queries], last[row, queries]))
        return table[row, jnp.clip(wanted, 0, blocks - 1) * PAGES + number], head, 0, 0

    return index


def attend(
    q: Any, k_cache: Any, v_cache: Any, table: Any, low: Any, high: Any, sinks: Any,
    *, scale: float, softcap: float, interpret: bool,
) -> Any:  # fmt: skip
    """q [R, Q, K, G, D] over pages [pages, K, S, ..], sinks [K, G] or None -> [R, Q, K, G, V]."""
    rows, each, heads, group, width = q.shape
    size, wide = k_cache.shape[2], v_cache.shape[3]
    step = each if each * group <= QUERIES else -(-max(QUERIES // group, 1) // 8) * 8
    more, missing = -each % step, -table.shape[1] % PAGES
    table = jnp.pad(table, ((0, 0), (0, missing)))
    blocks, parts, count = table.shape[1] // PAGES, (each + more) // step, step * group
    q = jnp.pad(q, ((0, 0), (0, more), (0, 0), (0, 0), (0, 0))).transpose(0, 2, 1, 3, 4)
    q = q.reshape(rows, heads, -1, width)
    low = jnp.pad(low, ((0, 0), (0, more)), mode="edge")
    high = jnp.pad(high, ((0, 0), (0, more)), mode="edge")
    first = low.reshape(rows, parts, step).min(-1) // (PAGES * size)
    last = high.reshape(rows, parts, step).max(-1) // (PAGES * size)
    low, high = (jnp.repeat(bound, group, 1)[..., None] for bound in (low, high))  # [R, Q G, 1]

    def of_queries(row: Any, head: Any, queries: Any, *_: Any) -> tuple[Any, ...]:
        return row, head, queries, 0

    def of_bounds(row: Any, head: Any, queries: Any, *_: Any) -> tuple[Any, ...]:
        del head
        return row, queries, 0

    bound = pl.BlockSpec((1, count, 1), of_bounds)
    given, places = [q, low, high], [pl.BlockSpec((1, 1, count, width), of_queries), bound, bound]
    if sinks is not None:
        given.append(jnp.tile(sinks.astype(jnp.float32), (1, step))[..., None])  # [K, M, 1]
        places.append(pl.BlockSpec((1, count, 1), lambda row, head, *_: (head, 0, 0)))
    for cache in (k_cache, v_cache):
        given += [cache] * PAGES
        places += [pl.BlockSpec((1, 1, size, cache.shape[3]), _page(number, blocks)) for number in range(PAGES)]
    made = pl.pallas_call(
        partial(_kernel, size=PAGES * size, scale=scale, softcap=softcap, sinks=sinks is not None),
        out_shape=jax.ShapeDtypeStruct((rows, heads, parts * count, wide), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, heads, parts, blocks),
            in_specs=places,
            out_specs=pl.BlockSpec((1, 1, count, wide), of_queries),
            scratch_shapes=[pltpu.VMEM((count, lanes), jnp.float32) for lanes in (128, 128, wide)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="paged_attention",
    )(table, first, last, *given)
    made = made.reshape(rows, heads, each + more, group, wide)[:, :, :each]
    return made.transpose(0, 2, 1, 3, 4)


def paged_attention(interpret: bool, mesh: Any = None) -> Callable[..., Array]:
    """The op, as `reference_attention.paged_attention` of every call. `interpret`: by jax instead of for a TPU's cores.
    `mesh`: devices that share out the kv heads, where their number divides these; otherwise each attends to all."""

    def op(q_THD: Array, cache: tuple[Array, Array], batch: PagedBatch, call: AttentionCall) -> Array:
        q, (k_cache, v_cache) = lift(q_THD), (lift(each) for each in cache)
        tokens, heads, width = q.shape
        here, lens, each = rows_of(batch, tokens)
        low, high = spans(here, lens, call)
        kv_heads = k_cache.shape[1]
        sinks = None if call.sinks is None else lift(call.sinks).reshape(kv_heads, -1)
        run = partial(attend, scale=call.scale, softcap=call.softcap, interpret=interpret)
        if mesh is not None:
            # The compiler that spreads a step over devices does not look into a kernel.
            cut = mesh.axis_names[0] if kv_heads % mesh.size == 0 else None
            of_heads, of_pages = Spec(None, None, cut), Spec(None, cut)
            of_sinks = Spec(cut) if sinks is not None else None
            run = jax.shard_map(
                run, mesh=mesh, in_specs=(of_heads, of_pages, of_pages, Spec(), Spec(), Spec(), of_sinks),
                out_specs=of_heads, check_vma=False,
            )  # fmt: skip
        grouped = q.reshape(-1, each, kv_heads, heads // kv_heads, width)
        made = run(grouped, k_cache, v_cache, lift(batch.page_table), low, high, sinks)
        return Array(made.reshape(tokens, heads, -1))

    return op
