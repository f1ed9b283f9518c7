"""Which experts each rank of `ep_size` holds, so that all have about the same to do: copies of hot experts, packed.

Copies: again and again one more of the expert with the largest load a copy. Packing: the heaviest copy first, onto
the lightest rank with room; then copies of the fullest and the emptiest rank change places while that helps. Copies of
an expert are on different ranks, each has one share of its load. (After the description of DeepSeek's EPLB.)

Legend: E experts, S slots of all ranks together, the same number on each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Load = NDArray[np.float64]  # [E]: how much there is to do for each expert
    Ranks = list[list[int]]  # of each rank the experts in its slots

_MOST = 10_000  # exchanges of one packing: far more than it takes


def trivial(experts: int, slots: int, ranks: int) -> Ranks:
    """In their order, and again from the first on."""
    each = slots // ranks
    return [[slot % experts for slot in range(rank * each, (rank + 1) * each)] for rank in range(ranks)]


def copies_of(load: Load, slots: int, ranks: int) -> NDArray[np.int64]:
    """How many copies each expert has, [E], at most one a rank; all together `slots`."""
    copies = np.ones(len(load), np.int64)
    for _ in range(slots - len(load)):
        copies[int(np.where(copies < ranks, load / copies, -1.0).argmax())] += 1
    return copies


def balanced(load: Load, slots: int, ranks: int) -> Ranks:
    """Experts by rank. No rank has more than the mean and one copy's load beyond it.

    Raises:
        ValueError: fewer slots than experts, more than each rank could fill with different ones, or unequal ranks.
    """
    if not len(load) <= slots <= len(load) * ranks or slots % ranks:
        raise ValueError(f"{len(load)} experts in {slots} slots of {ranks} ranks")
    load = np.asarray(load, np.float64)
    copies, room = copies_of(load, slots, ranks), slots // ranks
    share = load / copies
    held: list[set[int]] = [set() for _ in range(ranks)]
    sums = np.zeros(ranks)
    for expert in np.argsort(-share, kind="stable").tolist():
        for _ in range(int(copies[expert])):
            lacks = [rank for rank in range(ranks) if expert not in held[rank]]
            open_ones = [rank for rank in lacks if len(held[rank]) < room]
            if not open_ones:  # those with room have it: one of them takes another's expert in its stead
                near = next(rank for rank in range(ranks) if len(held[rank]) < room)
                far = min(lacks, key=lambda rank: sums[rank])
                _hand(held, sums, share, far, near, min(held[far] - held[near]))
                open_ones = [far]
            rank = min(open_ones, key=lambda rank: (sums[rank], len(held[rank])))
            held[rank].add(expert)
            sums[rank] += share[expert]
    _level(held, sums, share)
    return [sorted(experts) for experts in held]


def _hand(held: list[set[int]], sums: Load, share: Load, giver: int, taker: int, expert: int) -> None:
    held[giver].remove(expert)
    held[taker].add(expert)
    sums[giver] -= share[expert]
    sums[taker] += share[expert]


def _level(held: list[set[int]], sums: Load, share: Load) -> None:
    """Let the fullest and the emptiest rank exchange experts while their difference shrinks."""
    for _ in range(_MOST):
        full, empty = int(sums.argmax()), int(sums.argmin())
        gap = float(sums[full] - sums[empty])
        ours, theirs = sorted(held[full] - held[empty]), sorted(held[empty] - held[full])
        if not ours or not theirs:
            return
        gains = share[ours][:, None] - share[theirs][None]
        best = int(np.abs(gains - gap / 2).argmin())
        at, other = divmod(best, len(theirs))
        if not 1e-9 * gap < gains[at, other] < gap * (1 - 1e-9):
            return
        _hand(held, sums, share, full, empty, ours[at])
        _hand(held, sums, share, empty, full, theirs[other])


def settled(found: Ranks, before: Ranks) -> Ranks:
    """The same packing with its ranks, and their slots, in the order that leaves most experts where they were."""
    left, placed = list(range(len(found))), list[list[int]]()
    for held in before:
        best = max(left, key=lambda other: len(set(found[other]) & set(held)))
        left.remove(best)
        wanted, stays = set(found[best]), set(found[best]) & set(held)
        new = iter(sorted(wanted - stays))
        placed.append([expert if expert in stays else next(new) for expert in held])
    return placed


def balancedness(load: Load, ranks: Ranks) -> float:
    """The mean of what ranks have to do, over the most that one has; 1 where there is nothing."""
    copies = np.bincount([expert for held in ranks for expert in held], minlength=len(load))
    sums = [float((load[held] / copies[held]).sum()) for held in map(list, ranks)]
    return float(np.mean(sums)) / max(sums) if max(sums) > 0 else 1.0
