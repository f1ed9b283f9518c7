"""Attention over pages in plain jax: every row's pages are gathered, and what a token does not see is masked.

Steps are rows of one token each, or one row: those are the shapes that are compiled (`engine/compiled.py`). Legend as
in `ops.py`; R rows, Q new tokens of a row, L positions of its pages, G query heads of a kv head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from phloem.kernels.jax.tensor import Array, lift

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.kernels.calls import AttentionCall, IndexCall, LatentCall, PagedBatch

BLOCK = 128  # queries of one row at a time: their scores are what takes memory
LOW = -1e30  # not -inf: behind the last token of a padded step there are queries that see nothing


def write(values_TKD: Any, cache: Any, slots_T: Any) -> Any:
    """The cache with the new tokens' entries."""
    size = cache.shape[2]
    return cache.at[slots_T // size, :, slots_T % size].set(values_TKD.astype(cache.dtype))


def write_kv(k_TKD: Array, v_TKD: Array, k_cache: Array, v_cache: Array, slots_T: Array) -> None:
    slots = lift(slots_T)
    k_cache.a = write(lift(k_TKD), lift(k_cache), slots)
    v_cache.a = write(lift(v_TKD), lift(v_cache), slots)


def write_latent(latents_TC: Array, cache: Array, slots_T: Array) -> None:
    cache.a = write(lift(latents_TC)[:, None], lift(cache), lift(slots_T))


def rows_of(batch: PagedBatch, tokens: int) -> tuple[Any, Any, int]:
    """(Positions of the new tokens [R, Q], tokens of each row [R, 1], Q)."""
    starts, lens = lift(batch.query_start), lift(batch.seq_lens)
    rows = lens.shape[0]
    if rows not in (1, tokens):
        raise ValueError(f"a step of {tokens} tokens in {rows} rows: not one row, and not rows of one token")
    each = tokens // rows
    new = starts[1:] - starts[:-1]
    return (lens - new)[:, None] + jnp.arange(each), lens[:, None], each


def _seen(here_RQ: Any, lens_R1: Any, length: int, call: AttentionCall) -> Any:
    """Which positions each token sees, [R, Q, L]."""
    here, there = here_RQ[:, :, None], jnp.arange(length)
    last = here
    if call.block:
        last = (here // call.block + 1) * call.block - 1
    seen = there < lens_R1[:, :, None]
    if call.causal:
        seen &= there <= last
    if call.window:
        seen &= here - there < call.window
        if not call.causal:
            seen &= there - here < call.window
    if call.chunk:
        seen &= here // call.chunk == there // call.chunk
    return seen


def _gathered(cache: Any, table_RP: Any) -> Any:
    """A row's pages as one run of positions, float32 [R, K, L, D]."""
    pages = cache[table_RP]  # [R, P, K, S, D]
    rows, count, heads, size, width = pages.shape
    return pages.transpose(0, 2, 1, 3, 4).reshape(rows, heads, count * size, width).astype(jnp.float32)


def _by_blocks(each: Callable[[Any, Any], Any], q: Any, here: Any) -> Any:
    """`each` over at most BLOCK queries at a time; q [R, Q, ..], here [R, Q]."""
    tokens = q.shape[1]
    if tokens <= BLOCK or tokens % BLOCK:
        return each(q, here)

    def cut(x: Any) -> Any:
        return jnp.moveaxis(x.reshape(x.shape[0], tokens // BLOCK, BLOCK, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda part: each(*part), (cut(q), cut(here)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], tokens, *out.shape[3:])


def _einsum(spec: str, x: Any, y: Any) -> Any:
    return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST)


def paged_attention(q_THD: Array, cache: tuple[Array, Array], batch: PagedBatch, call: AttentionCall) -> Array:
    """As `reference_attention.paged_attention`, of every call."""
    q, (k_cache, v_cache), table = lift(q_THD), cache, lift(batch.page_table)
    tokens, heads, size = q.shape
    here, lens, each = rows_of(batch, tokens)
    k, v = _gathered(lift(k_cache), table), _gathered(lift(v_cache), table)
    kv_heads, length = k.shape[1], k.shape[2]
    # What nobody sees may be a page that was given back: a weight of 0 takes no NaN away.
    v = jnp.where((jnp.arange(length) < lens)[:, None, :, None], v, 0.0)
    sinks = None if call.sinks is None else lift(call.sinks).astype(jnp.float32).reshape(kv_heads, -1)

    def part(q_RQKGD: Any, here_RQ: Any) -> Any:
        scores = _einsum("rqkgd,rkld->rkgql", q_RQKGD.astype(jnp.float32), k) * call.scale
        if call.softcap:
            scores = call.softcap * jnp.tanh(scores / call.softcap)
        seen = _seen(here_RQ, lens, length, call)[:, None, None]
        scores = jnp.where(seen, scores, LOW)
        if sinks is not None:
            column = jnp.broadcast_to(sinks[None, :, :, None, None], (*scores.shape[:-1], 1))
            scores = jnp.concatenate((scores, column), -1)
        weights = jax.nn.softmax(scores, -1)[..., :length]
        weights = jnp.where(seen, weights, 0.0)
        return _einsum("rkgql,rkld->rqkgd", weights, v)

    grouped = q.reshape(-1, each, kv_heads, heads // kv_heads, size)
    return Array(_by_blocks(part, grouped, here).reshape(tokens, heads, -1).astype(q.dtype))


def latent_attention(
    q_nope_THN: Array,
    q_rope_THP: Array,
    cache: Array,
    batch: PagedBatch,
    call: LatentCall,
    chosen_Tk: Array | None = None,
) -> Array:
    """As `reference_attention.latent_attention`, with keys and values absorbed: heads attend to the latents."""
    nope, rope = lift(q_nope_THN), lift(q_rope_THP)
    tokens = nope.shape[0]
    here, lens, each = rows_of(batch, tokens)
    kept = _gathered(lift(cache), lift(batch.page_table))[:, 0]  # [R, L, C]
    length = kept.shape[1]
    kept = jnp.where((jnp.arange(length) < lens)[:, :, None], kept, 0.0)
    w_uk, w_uv = (lift(w).astype(jnp.float32) for w in (call.w_uk, call.w_uv))
    low = _einsum("thn,hnc->thc", nope.astype(jnp.float32), w_uk)
    q = jnp.concatenate((low, rope.astype(jnp.float32)), -1)
    extra = None if chosen_Tk is None else _among(lift(chosen_Tk), length)
    if extra is not None:
        q = jnp.concatenate((q, jnp.broadcast_to(extra[:, None], (tokens, q.shape[1], length))), -1)
    q = q.reshape(-1, each, *q.shape[1:])
    latent, width = w_uk.shape[2], kept.shape[2]

    def part(q_RQHC: Any, here_RQ: Any) -> Any:
        scores = _einsum("rqhc,rlc->rhql", q_RQHC[..., :width], kept) * call.scale
        seen = (jnp.arange(length) <= here_RQ[:, :, None]) & (jnp.arange(length) < lens[:, :, None])
        if extra is not None:
            seen &= q_RQHC[:, :, 0, width:] > 0
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, LOW), -1)
        return _einsum("rhql,rlc->rqhc", weights, kept[..., :latent])

    out = _by_blocks(part, q, here).reshape(tokens, -1, latent)
    return Array(_einsum("thc,hcd->thd", out, w_uv).astype(nope.dtype))


def _among(chosen_Tk: Any, length: int) -> Any:
    """Which positions each token has chosen, as 1.0 and 0.0 [T, L]."""
    rows = jnp.arange(chosen_Tk.shape[0])[:, None]
    places = jnp.where(chosen_Tk < 0, length, chosen_Tk)
    return jnp.zeros((chosen_Tk.shape[0], length + 1)).at[rows, places].set(1.0)[:, :length]


def choose_keys(call: IndexCall, cache: Array, batch: PagedBatch) -> Array:
    """As `reference_attention.choose_keys`."""
    q = lift(call.q).astype(jnp.float32)
    here, _, each = rows_of(batch, q.shape[0])
    keys = _gathered(lift(cache), lift(batch.page_table))[:, 0]
    q = q.reshape(-1, each, *q.shape[1:])
    dots = jax.nn.relu(_einsum("rqhd,rld->rqhl", q, keys))
    weights = lift(call.weights).astype(jnp.float32).reshape(*q.shape[:3])
    scores = _einsum("rqhl,rqh->rql", dots, weights)
    return Array(topk_indices(scores.reshape(-1, keys.shape[1]), here.reshape(-1) + 1, call.count))


def topk_indices(scores_TL: Any, lengths_T: Any, k: int) -> Any:
    unseen = jnp.arange(scores_TL.shape[1]) >= lengths_T[:, None]
    ranked = jnp.argsort(jnp.where(unseen, jnp.inf, -scores_TL.astype(jnp.float32)), axis=-1, stable=True)[:, :k]
    ids = jnp.pad(ranked, ((0, 0), (0, max(0, k - ranked.shape[1]))), constant_values=-1)
    return jnp.where(jnp.arange(k) >= lengths_T[:, None], -1, ids).astype(jnp.int32)
