"""Experts over ranks: each is somewhere, copies are on different ranks, and no rank has much more to do than others."""

from __future__ import annotations

import numpy as np
import pytest

from phloem.distributed.balance import balanced, balancedness, copies_of, settled, trivial


def cases() -> list[tuple[np.ndarray, int, int]]:
    draw, found = np.random.default_rng(0), list[tuple[np.ndarray, int, int]]()
    for _ in range(300):
        ranks = int(draw.choice([2, 3, 4, 8, 16]))
        experts = ranks * int(draw.integers(1, 9))
        slots = experts + ranks * int(draw.integers(0, (experts * ranks - experts) // ranks + 1))
        kind = draw.integers(4)
        load = draw.pareto(1.0, experts) if kind == 0 else draw.integers(0, 5, experts).astype(float)
        load = np.zeros(experts) if kind == 1 else load
        load = 1e6 / np.arange(1, experts + 1) if kind == 2 else load
        found.append((load, slots, ranks))
    return found


def test_every_expert_is_somewhere_and_its_copies_on_different_ranks() -> None:
    for load, slots, ranks in cases():
        found = balanced(load, slots, ranks)
        assert [len(held) for held in found] == [slots // ranks] * ranks
        assert all(len(set(held)) == len(held) for held in found)
        assert {expert for held in found for expert in held} == set(range(len(load)))


def test_no_rank_has_more_than_the_mean_and_one_copy() -> None:
    for load, slots, ranks in cases():
        share = load / copies_of(load, slots, ranks)
        sums = [share[held].sum() for held in balanced(load, slots, ranks)]
        assert max(sums) - min(sums) <= share.max() * (1 + 1e-6) + 1e-9
        assert balancedness(load, trivial(len(load), slots, ranks)) <= 1 + 1e-9


def test_copies_go_to_experts_with_the_most_to_do() -> None:
    load = np.array([8.0, 1.0, 4.0, 1.0])
    assert copies_of(load, 4, 4).tolist() == [1, 1, 1, 1]
    assert copies_of(load, 7, 4).tolist() == [3, 1, 2, 1]
    assert copies_of(load, 8, 2).tolist() == [2, 2, 2, 2]


def test_a_skewed_load_is_even_with_an_eighth_more_slots() -> None:
    load = 1.0 / np.arange(1, 257)
    assert balancedness(load, trivial(256, 256, 32)) < 0.2
    assert balancedness(load, balanced(load, 288, 32)) >= 0.9


def test_experts_that_need_not_move_stay_in_their_slots() -> None:
    for load, slots, ranks in cases()[:50]:
        found = balanced(load, slots, ranks)
        turned = [list(reversed(held)) for held in found[1:] + found[:1]]
        assert settled(found, turned) == turned
        placed = settled(found, trivial(len(load), slots, ranks))
        assert sorted(map(sorted, placed)) == sorted(map(sorted, found))


@pytest.mark.parametrize(("slots", "ranks"), [(3, 2), (5, 2), (10, 2)])
def test_slots_that_cannot_be_filled_are_refused(slots: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"4 experts in {slots} slots"):
        balanced(np.ones(4), slots, ranks)
