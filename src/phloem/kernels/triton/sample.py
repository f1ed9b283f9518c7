"""From logits to tokens on the device, with nothing that the host must wait for.

A row's kept set is a prefix of its tokens in falling order, so it is found as a threshold: keys (floats as ordered
integers) are narrowed three bits a pass, eight thresholds at a time, by how many tokens, or how much probability, lie
at or above each. No sort. Ties at the threshold are taken in token-id order, as a stable sort would. The draw is one
uniform number per (seed, position), inverted through the kept weights in token-id order. Legend: L rows, V vocabulary.
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.calls import Draw
from phloem.kernels.triton._base import ceil_div, power_of_2, splitmix64

BLOCK = 2048


@triton.jit(do_not_specialize=["words", "stride_mask"])
def _mask_rows(logits, rows, mask, stride_logits, stride_mask, vocab, words, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + at).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(mask + at * stride_mask + token // 32, mask=token // 32 < words, other=0)
    forbidden = (token < vocab) & (((word >> (token % 32)) & 1) == 0)
    tl.store(logits + row * stride_logits + token, tl.full([BLOCK], float("-inf"), tl.float32), mask=forbidden)


@triton.jit
def _key(x):
    """Floats as int32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weight_of(key, best, inverse_temperature):
    """exp((x - best) / temperature) of the float whose key this is."""
    bits = key.to(tl.int32)
    x = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    return tl.exp((x - best) * inverse_temperature)


@triton.jit
def _threshold(
    row,
    vocab,
    best,
    inverse_temperature,
    wanted,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key at or above which lie at least `wanted` tokens (or as much weight), and what lies above it.

    Keys are searched as offsets from the least int32, three bits a pass (two in the first).
    """
    base = tl.full([1], 0, tl.int64)
    above = 0.0
    step = tl.arange(0, 8)
    for turn in range(11):
        shift = 30 - 3 * turn
        candidate = base + (step.to(tl.int64) << shift)
        threshold = (candidate - 2147483648)[:, None]
        held = tl.zeros([8], tl.float32)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row + token, mask=token < vocab, other=float("-inf"))
            weight = tl.exp((x - best) * inverse_temperature) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            weight = tl.where(token < vocab, weight, 0.0)
            held += tl.sum(tl.where(_key(x).to(tl.int64)[None, :] >= threshold, weight[None, :], 0.0), axis=1)
        # Candidate 0 always suffices; held falls with the candidate. The next one up is what lies above the range.
        enough = (held >= wanted) | (step == 0)
        # The first pass has but two bits: candidates beyond the range hold nothing and are never enough.
        chosen = tl.max(tl.where(enough, step, 0), axis=0)
        beyond = tl.sum(tl.where(step == chosen + 1, held, 0.0), axis=0)
        above = tl.where(chosen < 7, beyond, above)
        base = base + (chosen.to(tl.int64) << shift)
    return tl.sum(base, axis=0) - 2147483648, above


@triton.jit
def _sample(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    positions,
    out,
    stride_logits,
    vocab,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * stride_logits
    heat = tl.load(temperature + at)
    k = tl.load(top_k + at)
    best = float("-inf")
    first = 0
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(row + token, mask=token < vocab, other=float("-inf"))
        high = tl.max(x, axis=0)
        if high > best:
            first = tl.min(tl.where(x == high, token, 2147483647), axis=0)
            best = high
    if (heat <= 0.0) | (k == 1):
        tl.store(out + at, first)
        return

    # Kept are the keys above `limit`, and the first `ties` tokens of those that equal it. No weight, never drawn.
    cold = 1.0 / heat
    least = tl.sum(_key(tl.full([1], float("-inf"), tl.float32)).to(tl.int64), axis=0)
    limit = least
    ties = 0.0
    if (k > 0) & (k < vocab):
        limit, above = _threshold(row, vocab, best, cold, k.to(tl.float32), False, BLOCK)
        ties = k.to(tl.float32) - above
        limit = tl.maximum(limit, least)
    p = tl.load(top_p + at)
    if p < 1.0:
        # The share is of what top-k left.
        mass = ties * _weight_of(limit, best, cold)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row + token, mask=token < vocab, other=float("-inf"))
            mass += tl.sum(tl.where(_key(x).to(tl.int64) > limit, tl.exp((x - best) * cold), 0.0), axis=0)
        edge, above = _threshold(row, vocab, best, cold, p * mass, True, BLOCK)
        if (edge > least) & (edge >= limit):
            # A token is kept while the weight before it is below the share: so many of those at the edge.
            kept_ties = tl.maximum(tl.ceil((p * mass - above) / _weight_of(edge, best, cold)), 1.0)
            ties = tl.where(edge == limit, tl.minimum(ties, kept_ties), kept_ties)
            limit = edge
    floor = tl.load(min_p + at)

    # Draw: weights of kept tokens summed in token order, twice in the same order, so that the sums agree.
    total = 0.0
    taken = 0.0
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(row + token, mask=token < vocab, other=float("-inf"))
        weight = tl.exp((x - best) * cold)
        keys = _key(x).to(tl.int64)
        tied = (keys == limit).to(tl.float32)
        rank = taken + tl.cumsum(tied, axis=0) - tied
        kept = ((keys > limit) | ((keys == limit) & (rank < ties))) & (weight >= floor)
        total += tl.sum(tl.where(kept, weight, 0.0), axis=0)
        taken += tl.sum(tied, axis=0)
    number = tl.load(seeds + at).to(tl.uint64, bitcast=True)
    place = (tl.load(positions + at) + 1).to(tl.uint64, bitcast=True)
    random = splitmix64(number + place * 0x9E3779B97F4A7C15)
    target = (random >> 40).to(tl.float32) * 5.9604644775390625e-08 * total
    passed = 0.0
    taken = 0.0
    choice = first
    found = 0
    for start in range(0, vocab, BLOCK):
        if found == 0:
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row + token, mask=token < vocab, other=float("-inf"))
            weight = tl.exp((x - best) * cold)
            keys = _key(x).to(tl.int64)
            tied = (keys == limit).to(tl.float32)
            rank = taken + tl.cumsum(tied, axis=0) - tied
            kept = ((keys > limit) | ((keys == limit) & (rank < ties))) & (weight >= floor)
            weight = tl.where(kept, weight, 0.0)
            sums = passed + tl.cumsum(weight, axis=0)
            hit = tl.min(tl.where((sums > target) & kept, token, 2147483647), axis=0)
            # Should rounding leave the target unreached, the last kept token is the answer.
            last = tl.max(tl.where(kept, token, -1), axis=0)
            choice = tl.where(hit < 2147483647, hit, tl.where(last >= 0, last, choice))
            found = tl.where(hit < 2147483647, 1, 0)
            passed += tl.sum(weight, axis=0)
            taken += tl.sum(tied, axis=0)
    tl.store(out + at, choice)


@triton.jit
def _row_part(logits, best, where, sums, stride_logits, vocab, span, parts, BLOCK: tl.constexpr):
    """Maximum, its first place, and sum of exp(x - maximum) of one span of one row."""
    at = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    top = float("-inf")
    first = 2147483647
    mass = 0.0
    end = tl.minimum(vocab, (part + 1) * span)
    for start in range(part * span, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at * stride_logits + token, mask=token < end, other=float("-inf")).to(tl.float32)
        high = tl.max(x, axis=0)
        here = tl.min(tl.where(x == high, token, 2147483647), axis=0)
        first = tl.where(high > top, here, first)
        new_top = tl.maximum(top, high)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        mass = mass * tl.exp(top - finite) + tl.sum(tl.exp(x - finite), axis=0)
        top = new_top
    tl.store(best + at * parts + part, top)
    tl.store(where + at * parts + part, first)
    tl.store(sums + at * parts + part, mass)


@triton.jit
def _row_join(best, where, sums, index, lse, parts, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    keep = part < parts
    high = tl.load(best + at * parts + part, mask=keep, other=float("-inf"))
    first = tl.load(where + at * parts + part, mask=keep, other=2147483647)
    mass = tl.load(sums + at * parts + part, mask=keep, other=0.0)
    top = tl.max(high, axis=0)
    place = tl.min(tl.where(high == top, first, 2147483647), axis=0)
    # A row of nothing but NaN or minus infinity has no maximum: token 0, and what the sum then is.
    tl.store(index + at, tl.where(place == 2147483647, 0, place))
    finite = tl.where(top == float("-inf"), 0.0, top)
    tl.store(lse + at, finite + tl.log(tl.sum(mass * tl.exp(high - finite), axis=0)))


def _reduce(logits_LV: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocab = logits_LV.shape
    index = torch.empty(rows, dtype=torch.int32, device=logits_LV.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits_LV.device)
    if rows == 0:
        return index, lse
    span = 8 * BLOCK
    parts = ceil_div(vocab, span)
    best = torch.empty((rows, parts), dtype=torch.float32, device=logits_LV.device)
    where = torch.empty((rows, parts), dtype=torch.int32, device=logits_LV.device)
    sums = torch.empty((rows, parts), dtype=torch.float32, device=logits_LV.device)
    _row_part[(rows, parts)](
        logits_LV, best, where, sums, logits_LV.stride(0), vocab, span, parts, BLOCK=min(BLOCK, power_of_2(vocab))
    )
    _row_join[(rows,)](best, where, sums, index, lse, parts, BLOCK=power_of_2(parts))
    return index, lse


def argmax(logits_LV: Tensor) -> Tensor:
    """The first largest token of each row, int32 [L]."""
    return _reduce(logits_LV)[0]


def logsumexp(logits_LV: Tensor) -> Tensor:
    """float32 [L]; the vocabulary is cut into spans of fixed size, so a row's sum does not vary with the batch."""
    return _reduce(logits_LV)[1]


def mask_tokens_(logits_LV: Tensor, rows_M: Tensor, mask_MW: Tensor) -> None:
    """In rows `rows_M` only tokens whose bit is set stay; tokens beyond the mask's words are forbidden."""
    if rows_M.shape[0]:
        vocab = logits_LV.shape[1]
        _mask_rows[(rows_M.shape[0], ceil_div(vocab, BLOCK))](
            logits_LV,
            rows_M,
            mask_MW,
            logits_LV.stride(0),
            mask_MW.stride(0),
            vocab,
            mask_MW.shape[1],
            BLOCK=BLOCK,
        )


def sample(logits_LV: Tensor, draw: Draw) -> Tensor:
    """A token per row, int32 [L]. Temperature 0 or top_k 1 is greedy; top_k outside [1, V) is off.

    Filters apply in this order, each to what is left: top-k, top-p (a share of what top-k left), min-p (relative to
    the best token). The draw is `(splitmix64(seed + golden * (position + 1)) >> 40) * 2^-24`; seeds are the bits of
    an unsigned 64-bit number in int64.
    """
    rows, vocab = logits_LV.shape
    out = torch.empty(rows, dtype=torch.int32, device=logits_LV.device)
    if logits_LV.dtype != torch.float32:
        logits_LV = logits_LV.float()  # thresholds are searched among the bits of float32
    if rows:
        _sample[(rows,)](
            logits_LV,
            draw.temperature,
            draw.top_k,
            draw.top_p,
            draw.min_p,
            draw.seeds,
            draw.positions,
            out,
            logits_LV.stride(0),
            vocab,
            BLOCK=min(BLOCK, power_of_2(vocab)),
            num_warps=16,
        )
    return out
