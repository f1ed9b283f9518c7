"""Which experts serve which tokens: routing, and listing the (token, choice) pairs expert by expert.

Few tokens are routed and sorted in one launch by one program, or sorted in one; many in three. Legend: E experts,
k choices.
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels import reference_models as models
from phloem.kernels.triton._base import ceil_div, power_of_2
from phloem.kernels.triton.early import await_previous, early

if TYPE_CHECKING:
    from phloem.kernels.specs import RouterSpec

FEW_TOKENS = 4  # up to which nothing is sorted: each pair reads its expert's rows for itself
CHOSEN_EXPERTS = 256  # up to which each program of few tokens can route for itself
SORTED_TOKENS = 64  # up to which one program can route and sort all tokens
SORTED_CELLS = 8192  # tokens times experts that such a program can hold


@triton.jit
def _route(
    logits,
    bias,
    weights,
    ids,
    stride_logits,
    experts,
    scaling,
    eps,
    least,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    LATE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """LATE: the logits themselves decide who is chosen, and the score is computed of the chosen alone.

    GROUPS above 1 (then there are BLOCK experts): only those of the KEEP groups take part whose GROUP_BEST best
    experts, 1 or 2, have the largest sum, of equals the lowest group."""
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    keep = expert < experts
    x = tl.load(logits + token * stride_logits + expert, mask=keep, other=float("-inf")).to(tl.float32)
    if LATE:
        score = tl.where(keep, x, 0.0)
    elif SIGMOID:
        score = tl.where(keep, tl.sigmoid(x), 0.0)
    else:
        score = tl.exp(x - tl.max(x, axis=0))
        score = score / tl.sum(score, axis=0)
    ranked = tl.where(keep, score, float("-inf"))
    if HAS_BIAS:
        # The bias decides who is chosen, not how much it counts (DeepSeek-V3's load balancing).
        ranked = tl.where(keep, score + tl.load(bias + expert, mask=keep, other=0.0), float("-inf"))
    if GROUPS > 1:
        member = tl.arange(0, BLOCK // GROUPS)[None, :]
        by_group = tl.reshape(ranked, [GROUPS, BLOCK // GROUPS])
        value_of = tl.max(by_group, axis=1)
        if GROUP_BEST == 2:
            best = tl.min(tl.where(by_group == value_of[:, None], member, BLOCK), axis=1)
            value_of += tl.max(tl.where(member == best[:, None], float("-inf"), by_group), axis=1)
        group = tl.arange(0, GROUPS)
        # Each group's value beside that of every other one: rows and columns of the same numbers.
        this = tl.broadcast_to(value_of[:, None], [GROUPS, GROUPS])
        other = tl.trans(this)
        before = (other > this) | ((other == this) & (group[None, :] < group[:, None]))
        kept = tl.sum(before.to(tl.int32), axis=1) < KEEP
        ranked = tl.reshape(tl.where(kept[:, None], by_group, float("-inf")), [BLOCK])
    choice = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    value = tl.zeros([BLOCK_K], tl.float32)
    for turn in range(TOP_K):
        high = tl.max(ranked, axis=0)
        # Where logits are NaN nothing equals the largest: any expert will do, but there must be such a one.
        place = tl.minimum(tl.min(tl.where(ranked == high, expert, BLOCK - 1), axis=0), experts - 1)
        mine = tl.sum(tl.where(expert == place, score, 0.0), axis=0)
        chosen = tl.where(choice == turn, place, chosen)
        value = tl.where(choice == turn, mine, value)
        ranked = tl.where(expert == place, float("-inf"), ranked)
    if LATE:
        if SIGMOID:
            value = tl.where(choice < TOP_K, tl.sigmoid(value), 0.0)
        else:
            value = tl.where(choice < TOP_K, value, float("-inf"))
            value = tl.exp(value - tl.max(value, axis=0))
            value = value / tl.sum(value, axis=0)
    if RENORMALISE:
        value = value / tl.maximum(tl.sum(value, axis=0) + eps, least)
    at = token * TOP_K + choice
    tl.store(weights + at, value * scaling, mask=choice < TOP_K)
    tl.store(ids + at, chosen, mask=choice < TOP_K)


@triton.jit
def choose(logits, experts, turn, TOP_K: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_E: tl.constexpr):
    """(Expert, weight) of a token's choice number `turn`, as `_route` has them: that one than which so many
    are better."""
    expert = tl.arange(0, BLOCK_E)
    x = tl.load(logits + expert, mask=expert < experts, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    score = tl.exp(x - top)
    whole = tl.sum(score, axis=0)
    score = score / whole
    rank = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, BLOCK_E, 16):
        other = start + tl.arange(0, 16)
        y = tl.load(logits + other, mask=other < experts, other=float("-inf")).to(tl.float32)
        rival = (tl.exp(y - top) / whole)[None, :]
        equal = (rival == score[:, None]) & (other[None, :] < expert[:, None])
        rank += tl.sum(((rival > score[:, None]) | equal).to(tl.int32), axis=1)
    # Where logits are NaN none is better than another: any expert will do, but there must be such a one.
    place = tl.minimum(tl.min(tl.where(rank == turn, expert, BLOCK_E - 1), axis=0), experts - 1)
    value = tl.sum(tl.where(expert == place, score, 0.0), axis=0)
    if RENORMALISE:
        value = value / tl.sum(tl.where(rank < TOP_K, score, 0.0), axis=0)
    return place, value


def route(
    logits_TE: Tensor,
    top_k: int,
    renormalise: bool,
    *,
    sigmoid: bool = False,
    late: bool = False,
    bias_E: Tensor | None = None,
    scaling: float = 1.0,
    eps: float = 0.0,
    least: float = 0.0,
    groups: tuple[int, int, int] = (1, 1, 1),
) -> tuple[Tensor, Tensor]:
    """Router logits -> weights float32 [T, k] and expert ids int32 [T, k], best first, ties to the lower id.

    `sigmoid`: of each logit; else the softmax. `late`: of the chosen alone, and logits decide who they are.
    With `renormalise` weights are divided by their sum + `eps`, at least `least`. `groups`: how many, how many of them
    take part, and by the sum of how many best experts they are chosen (1 or 2); both numbers are powers of two then.
    """
    tokens, experts = logits_TE.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits_TE.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits_TE.device)
    if tokens:
        _route[(tokens,)](
            logits_TE,
            bias_E if bias_E is not None else logits_TE,
            weights,
            ids,
            logits_TE.stride(0),
            experts,
            float(scaling),
            float(eps),
            float(least),
            TOP_K=top_k,
            SIGMOID=sigmoid,
            LATE=late,
            RENORMALISE=renormalise,
            HAS_BIAS=bias_E is not None,
            GROUPS=groups[0],
            KEEP=groups[1],
            GROUP_BEST=groups[2],
            BLOCK=power_of_2(experts),
            BLOCK_K=power_of_2(top_k),
            num_warps=1 if experts <= 128 else 4,
            **early(logits_TE),
        )
    return weights, ids


def route_op(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """The op table's entry: ids and weights, of any router; rare kinds in plain torch."""
    experts = logits_TE.shape[1]
    whole = spec.groups == 1 or (
        power_of_2(experts) == experts and power_of_2(spec.groups) == spec.groups and spec.group_best in (1, 2)
    )
    if spec.score == "sparse_mixer" or not whole or spec.groups > experts // 2:
        return models.route(logits_TE, bias_E, spec)
    weights_Tk, ids_Tk = route(
        logits_TE,
        spec.top_k,
        spec.renormalise,
        sigmoid=spec.score.endswith("sigmoid"),
        late=spec.score.startswith("chosen_"),
        bias_E=bias_E,
        scaling=spec.scale,
        eps=spec.eps,
        least=spec.floor,
        groups=(spec.groups, spec.keep, spec.group_best),
    )
    return ids_Tk, weights_Tk


@triton.jit
def _name_tiles(
    order,
    tile_expert,
    number,
    count,
    begin,
    pairs,
    tiles,
    expert,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Fill up each expert's tiles (it has `number` pairs, and `count` tiles from `begin` on), and name them."""
    pad = tl.arange(0, TILE)
    free = (begin * TILE + number)[None, :] + pad[:, None]
    tl.store(order + free, tl.full([TILE, BLOCK_E], 0, tl.int32) + pairs,
             mask=free < ((begin + count) * TILE)[None, :])  # fmt: skip
    used = tl.sum(count, axis=0)
    for tile in range(0, tl.max(count, axis=0)):
        tl.store(tile_expert + begin + tile, expert, mask=tile < count)
    every = tl.arange(0, BLOCK_TILES)
    tl.store(tile_expert + every, tl.full([BLOCK_TILES], -1, tl.int32), mask=(every >= used) & (every < tiles))


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _route_and_sort(
    logits,
    weights,
    ids,
    order,
    tile_expert,
    stride_logits,
    tokens,
    experts,
    tiles,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`_route` (softmax), `_count_expert` and `_place_expert` of a few tokens, in one program."""
    await_previous(PDL)
    token = tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    real = token < tokens
    keep = real[:, None] & (expert < experts)[None, :]
    x = tl.load(logits + token[:, None] * stride_logits + expert[None, :], mask=keep, other=float("-inf"))
    x = tl.where(real[:, None], x.to(tl.float32), 0.0)
    score = tl.exp(x - tl.max(x, axis=1)[:, None])
    score = score / tl.sum(score, axis=1)[:, None]
    ranked = tl.where(keep, score, float("-inf"))
    turn_of = tl.full([BLOCK_T, BLOCK_E], -1, tl.int32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for turn in range(TOP_K):
        high = tl.max(ranked, axis=1)
        place = tl.min(tl.where(ranked == high[:, None], expert[None, :], BLOCK_E - 1), axis=1)
        place = tl.minimum(place, experts - 1)
        here = (expert[None, :] == place[:, None]) & real[:, None]
        total += high
        turn_of = tl.where(here, turn, turn_of)
        ranked = tl.where(here, float("-inf"), ranked)
        tl.store(ids + token * TOP_K + turn, place, mask=real)
    chosen = turn_of >= 0
    value = score
    if RENORMALISE:
        value = score / total[:, None]
    pair = token[:, None] * TOP_K + turn_of
    tl.store(weights + pair, value, mask=chosen)
    # An expert's pairs stand in the order of their tokens; each token has it once at most.
    one = chosen.to(tl.int32)
    number = tl.sum(one, axis=0)
    count = (number + TILE - 1) // TILE
    begin = tl.cumsum(count, axis=0) - count
    at = (begin * TILE)[None, :] + tl.cumsum(one, axis=0) - one
    tl.store(order + at, pair, mask=chosen)
    _name_tiles(order, tile_expert, number, count, begin, tokens * TOP_K, tiles, expert, TILE, BLOCK_E, BLOCK_TILES)


def _in_one(tokens: int, experts: int) -> bool:
    """Whether one program sorts the pairs of so many tokens."""
    return 0 < tokens <= SORTED_TOKENS and power_of_2(tokens) * power_of_2(experts) <= SORTED_CELLS


def route_and_sort(
    logits_TE: Tensor, top_k: int, renormalise: bool, tile: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """`route`, then `sort_by_expert`, in one launch where the tokens are few: (weights, ids, (order, tile_expert))."""
    tokens, experts = logits_TE.shape
    block_t, block_e = power_of_2(tokens), power_of_2(experts)
    if not _in_one(tokens, experts):
        weights, ids = route(logits_TE, top_k, renormalise)
        return weights, ids, sort_by_expert(ids, experts, tile)
    device, tiles = logits_TE.device, most_tiles(tokens * top_k, experts, tile)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    ids, order, tile_expert = (
        torch.empty(shape, dtype=torch.int32, device=device) for shape in ((tokens, top_k), (tiles * tile,), (tiles,))
    )
    _route_and_sort[(1,)](
        logits_TE,
        weights,
        ids,
        order,
        tile_expert,
        logits_TE.stride(0),
        tokens,
        experts,
        tiles,
        TOP_K=top_k,
        RENORMALISE=renormalise,
        TILE=tile,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_TILES=power_of_2(tiles),
        num_warps=8 if block_t * block_e > 1024 else 4,
        **early(logits_TE),
    )
    return weights, ids, (order, tile_expert)


@triton.jit(do_not_specialize=["pairs"])
def _count_expert(ids, counts, pairs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    await_previous(PDL)
    expert = tl.program_id(0)
    number = 0
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        number += tl.sum((tl.load(ids + at, mask=at < pairs, other=-1) == expert).to(tl.int32), axis=0)
    tl.store(counts + expert, number)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _place_expert(
    ids,
    counts,
    order,
    tile_expert,
    pairs,
    experts,
    tiles,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per expert writes its list into `order` (padding: `pairs`) and its name on its tiles."""
    await_previous(PDL)
    expert = tl.program_id(0)
    other = tl.arange(0, BLOCK_E)
    number = tl.load(counts + other, mask=other < experts, other=0)
    needed = (number + TILE - 1) // TILE
    begin = tl.sum(tl.where(other < expert, needed, 0), axis=0)
    mine = tl.sum(tl.where(other == expert, needed, 0), axis=0)
    placed = begin * TILE
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        hit = (tl.load(ids + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
        to = placed + tl.cumsum(hit, axis=0) - hit
        tl.store(order + to, at, mask=hit != 0)
        placed += tl.sum(hit, axis=0)
    end = (begin + mine) * TILE
    pad = tl.arange(0, TILE)
    tl.store(order + placed + pad, tl.full([TILE], 0, tl.int32) + pairs, mask=placed + pad < end)
    for tile in range(begin, begin + mine):
        tl.store(tile_expert + tile, expert)
    if expert == experts - 1:
        for tile in range(begin + mine, tiles):
            tl.store(tile_expert + tile, -1)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _sort_few(
    ids,
    order,
    tile_expert,
    tokens,
    experts,
    tiles,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`_count_expert` and `_place_expert` of a few tokens, in one program."""
    await_previous(PDL)
    token = tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    real, known = token < tokens, (expert < experts)[None, :]
    number_of = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for turn in range(TOP_K):
        place = tl.load(ids + token * TOP_K + turn, mask=real, other=-1)
        number_of += ((expert[None, :] == place[:, None]) & known).to(tl.int32)
    number = tl.sum(number_of, axis=0)
    count = (number + TILE - 1) // TILE
    begin = tl.cumsum(count, axis=0) - count
    at = (begin * TILE)[None, :] + tl.cumsum(number_of, axis=0) - number_of
    for turn in range(TOP_K):
        place = tl.load(ids + token * TOP_K + turn, mask=real, other=-1)
        here = ((expert[None, :] == place[:, None]) & known).to(tl.int32)
        tl.store(order + tl.sum(here * at, axis=1), token * TOP_K + turn, mask=tl.sum(here, axis=1) > 0)
        at += here
    _name_tiles(order, tile_expert, number, count, begin, tokens * TOP_K, tiles, expert, TILE, BLOCK_E, BLOCK_TILES)


def sort_by_expert(ids_Tk: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """(order, tile_expert): pair numbers (token * k + choice) by expert, padded to tiles with T * k; each tile's
    expert, -1 for a tile past the end. Sized for the worst case, so that shapes depend on T alone.
    """
    pairs = ids_Tk.numel()
    tiles, device = most_tiles(pairs, experts, tile), ids_Tk.device
    order = torch.empty(tiles * tile, dtype=torch.int32, device=device)
    tile_expert = torch.empty(tiles, dtype=torch.int32, device=device)
    tokens, choices = ids_Tk.shape
    if _in_one(tokens, experts):
        _sort_few[(1,)](
            *(ids_Tk, order, tile_expert, tokens, experts, tiles),
            TOP_K=choices,
            TILE=tile,
            BLOCK_T=power_of_2(tokens),
            BLOCK_E=power_of_2(experts),
            BLOCK_TILES=power_of_2(tiles),
            num_warps=8 if power_of_2(tokens) * power_of_2(experts) > 1024 else 4,
            **early(ids_Tk),
        )
        return order, tile_expert
    counts = torch.empty(experts, dtype=torch.int32, device=device)
    block = min(1024, power_of_2(pairs))
    _count_expert[(experts,)](ids_Tk, counts, pairs, BLOCK=block, **early(ids_Tk))
    _place_expert[(experts,)](
        ids_Tk,
        counts,
        order,
        tile_expert,
        pairs,
        experts,
        tiles,
        TILE=tile,
        BLOCK_E=power_of_2(experts),
        BLOCK=block,
        **early(ids_Tk),
    )
    return order, tile_expert


def tile_size(pairs: int, experts: int) -> int:
    """Rows of a GEMM tile: about the pairs that an expert gets, between the tensor cores' least and 128."""
    return max(16, min(128, power_of_2(ceil_div(pairs, experts))))


def most_tiles(pairs: int, experts: int, tile: int) -> int:
    """Tiles that so many pairs take at most, however they fall; at least one."""
    return max(1, min(pairs, experts + pairs // tile))
