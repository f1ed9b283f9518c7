"""Checks of scripts/gpu_kernels.py for recurrent mixers and attention to chosen keys: scans, states that are read and
written where they lie, an indexer's choice."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.kernels import reference_attention as attention_ref
from phloem.kernels import reference_models as models_ref
from phloem.kernels import reference_scan as scan_ref
from phloem.kernels.calls import IndexCall, LatentCall, PooledStates

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_kernels import Kernels

Pairs = list[tuple[Tensor, Tensor]]


def _starts(k: Kernels, counts: Sequence[int]) -> Tensor:
    return k.tensor([0, *counts], torch.int64).cumsum(0).int()


def _compared(k: Kernels, run: Callable[[Any], Any], want: Callable[[Tensor], Any], rows: int, *shape: int) -> Pairs:
    """An op over states of these rows, and over a pool of which the rows read and write places, the last one anew."""
    state = k.randn(rows, *shape, dtype=torch.float32)
    pairs: Pairs = list(zip(run(state), want(state), strict=True))
    pool, index = k.randn(2 * rows + 1, *shape, dtype=torch.float32), torch.arange(rows, device=k.device)
    places = PooledStates(pool.clone(), index + 1, (index + rows + 1), index == rows - 1)
    y, after = want(scan_ref.read_states(pool, places.reads, places.fresh))
    scan_ref.write_states(pool, places.writes, after)
    return [*pairs, (run(places)[0], y), (places.pool, pool)]


def mamba2(k: Kernels) -> Pairs:
    """Rows of one token; rows by chunks, by tokens and of none, heads that share b and c."""
    from phloem.kernels.triton import gates, scan

    heads, size, groups, state = (4, 20, 2, 24) if k.tiny else (64, 64, 8, 128)
    pairs: Pairs = []
    for counts in ([1, 1, 1], [5, 0, 1, 19]) if k.tiny else ([1] * 33, [300, 0, 1, 8, 65]):
        begin, tokens = _starts(k, counts), sum(counts)
        x, b, c = k.randn(tokens, heads, size), k.randn(tokens, groups, state), k.randn(tokens, groups, state)
        decay, skip = -k.randn(heads, dtype=torch.float32).abs() * 4, k.randn(heads, dtype=torch.float32)
        dt, bias = k.randn(tokens, heads), k.randn(heads, dtype=torch.float32)
        steps = scan_ref.step_sizes(dt, bias, 1e-3, 0.5)
        pairs.append((gates.step_sizes(dt, bias, 1e-3, 0.5), steps))

        def run(states: Any, x: Tensor = x, given: Any = (steps, decay, b, c, skip), begin: Tensor = begin) -> Any:
            rest: Any = (*given, states, begin)
            return scan.mamba2_scan(x, *rest)

        def want(states: Tensor, x: Tensor = x, given: Any = (steps, decay, b, c, skip), begin: Tensor = begin) -> Any:
            rest: Any = (*given, states, begin)
            return scan_ref.mamba2_scan(x.float(), *rest)

        pairs += _compared(k, run, want, len(counts), heads, size, state)
    return pairs


def mamba1(k: Kernels) -> Pairs:
    from phloem.kernels.triton import scan

    channels, state, pairs = 40 if k.tiny else 4100, 16, list[tuple[Tensor, Tensor]]()
    for counts in ([1, 1, 1], [5, 0, 1, 9]) if k.tiny else ([1] * 33, [300, 0, 1, 8, 65]):
        begin, tokens = _starts(k, counts), sum(counts)
        x, b, c = k.randn(tokens, channels), k.randn(tokens, state), k.randn(tokens, state)
        decay, skip = -k.randn(channels, state, dtype=torch.float32).abs(), k.randn(channels, dtype=torch.float32)
        given = k.randn(tokens, channels, dtype=torch.float32).abs(), decay, b, c, skip

        def run(states: Any, x: Tensor = x, given: Any = given, begin: Tensor = begin) -> Any:
            rest: Any = (*given, states, begin)
            return scan.selective_scan(x, *rest)

        def want(states: Tensor, x: Tensor = x, given: Any = given, begin: Tensor = begin) -> Any:
            rest: Any = (*given, states, begin)
            return scan_ref.selective_scan(x.float(), *rest)

        pairs += _compared(k, run, want, len(counts), channels, state)
    return pairs


def pooled_states(k: Kernels) -> Pairs:
    """Convolutions and the delta rule over states where they lie."""
    from phloem.kernels.triton import recurrent

    counts, channels, heads, key, value = (
        ([5, 0, 1, 19], 70, 3, 32, 48) if k.tiny else ([70, 0, 1, 33], 4100, 8, 128, 128)
    )
    begin, tokens, pairs = _starts(k, counts), sum(counts), list[tuple[Tensor, Tensor]]()
    x, weight = k.randn(tokens, channels), k.randn(channels, 4, dtype=torch.float32)
    for bias, silu in ((None, True), (k.randn(channels, dtype=torch.float32), False)):

        def conv(states: Any, rest: Any = (begin, silu), bias: Tensor | None = bias) -> Any:
            return recurrent.causal_conv(x, weight, bias, states, *rest)

        def plain_conv(states: Tensor, rest: Any = (begin, silu), bias: Tensor | None = bias) -> Any:
            return scan_ref.causal_conv(x.float(), weight, bias, states, *rest)

        pairs += _compared(k, conv, plain_conv, len(counts), channels, 3)
    q, key_ = (F.normalize(k.randn(tokens, heads, key).float(), dim=-1).to(k.dtype) for _ in range(2))
    v, beta = k.randn(tokens, heads, value), k.randn(tokens, heads, dtype=torch.float32).sigmoid()
    for size in ((), (key,)):
        decay = -k.randn(tokens, heads, *size, dtype=torch.float32).abs()

        def delta(states: Any, decay: Tensor = decay) -> Any:
            return recurrent.gated_delta(q, key_, v, decay, beta, states, begin, key**-0.5)

        def plain_delta(states: Tensor, decay: Tensor = decay) -> Any:
            wide = q.float(), key_.float(), v.float()
            return scan_ref.gated_delta(*wide, decay, beta, states, begin, key**-0.5)

        pairs += _compared(k, delta, plain_delta, len(counts), heads, key, value)
    return pairs


def chosen_keys(k: Kernels) -> Pairs:
    """The choice by scores of whole numbers, which are exact, and are equal for many; attention to it; latents."""
    from phloem.kernels.triton import sparse

    heads, nope, rope, latent, size, count = (5, 16, 16, 32, 24, 20) if k.tiny else (32, 128, 64, 512, 128, 2048)
    pairs: Pairs = []
    for queries, lengths in (
        ([1, 1, 1], [90, 3, 33] if k.tiny else [9000, 3, 5000]),
        ([1, 4, 20], [90, 4, 33] if k.tiny else [9000, 4, 5000]),
    ):
        batch, tokens = k.paged(queries, lengths), sum(queries)
        keys = k.ints(-2, 3, batch.page_table.numel() + 1, 1, 16, 32).to(k.dtype)
        weights = k.ints(-2, 3, tokens, heads).to(k.dtype)
        call = IndexCall(k.ints(-2, 3, tokens, heads, 32).to(k.dtype), keys, weights, count)
        want = attention_ref.choose_keys(call, keys, batch)
        chosen = sparse.choose_keys(call, keys, batch)
        pairs.append((chosen.sort(-1)[0], want.sort(-1)[0]))
        wide = replace(call, count=lengths[0])  # nothing is left out
        pairs.append(
            (
                sparse.choose_keys(wide, keys, batch).sort(-1)[0],
                attention_ref.choose_keys(wide, keys, batch).sort(-1)[0],
            )
        )
        cache = k.randn(batch.page_table.numel() + 1, 1, 16, latent + rope)
        new, kept = k.randn(tokens, latent + rope), cache.clone()
        sparse.write_latent(new, kept, batch.token_slots)
        attention_ref.write_latent(new, cache, batch.token_slots)
        layer = LatentCall(
            k.randn(heads, nope, latent, by=latent**-0.5), k.randn(heads, latent, size, by=latent**-0.5), 0.1
        )
        q_nope, q_rope = k.randn(tokens, heads, nope), k.randn(tokens, heads, rope)
        got = sparse.chosen_latent_attention(q_nope, q_rope, cache, batch, layer, chosen)
        far = attention_ref.latent_attention(q_nope.float(), q_rope.float(), cache, batch, layer, chosen)
        pairs += [(kept, cache), (got, far)]
    return pairs


def gates_and_norms(k: Kernels) -> Pairs:
    """Decays of heads and of channels, norms of groups and of heads, tables of three positions."""
    from phloem.kernels.triton import gates, rope

    heads, size, tokens = (3, 24, 5) if k.tiny else (32, 128, 300)
    pairs: Pairs = []
    for own, log in (((heads,), k.randn(heads)), ((heads, size), k.randn(heads, 1))):
        given = k.randn(tokens, *own, by=5), k.randn(tokens, heads), k.randn(*own).float(), log.float()
        pairs += list(zip(gates.delta_gates(*given), scan_ref.delta_gates(*given), strict=True))
    log = k.randn(heads, dtype=torch.float32)
    pairs.append((gates.decays(log), scan_ref.decays(log)))
    for first in (False, True):
        x, gate = k.randn(tokens, heads * size), k.randn(tokens, heads * size + 8)[:, 8:]
        weight = k.randn(heads * size, dtype=torch.float32)
        for group in (0, size):
            want = models_ref.gated_rms_norm(x.float(), gate, weight, 1e-6, group, first)
            pairs.append((gates.gated_rms_norm(x, gate, weight, 1e-6, group, first), want))
        by_head = x.unflatten(1, (heads, size)), gate.unflatten(1, (heads, size)), weight[:size], 1e-6, 0, first
        want = models_ref.gated_rms_norm(by_head[0].float(), *by_head[1:])
        pairs.append((gates.gated_rms_norm(*by_head), want))
    positions, table = k.ints(0, 50, 3, tokens), k.randn(50, 2, 30, dtype=torch.float32)
    for interleaved in (False, True):
        given = positions, table, (8, 12, 10), interleaved
        pairs += list(zip(rope.mrope_table(*given), models_ref.mrope_table(*given), strict=True))
    return pairs


CHECKS = {
    "gates_and_norms": gates_and_norms,
    "mamba2": mamba2,
    "mamba1": mamba1,
    "pooled_states": pooled_states,
    "chosen_keys": chosen_keys,
}
