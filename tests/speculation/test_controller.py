"""How many drafts are verified: by made-up times and acceptance, without a clock."""

from __future__ import annotations

import random

import pytest

from phloem.speculation.controller import (
    BACKOFF,
    ENOUGH,
    LATE,
    LEDGER,
    LIKELIEST,
    MARGIN,
    PROBE,
    QUIET,
    WARY,
    Acceptance,
    Chain,
    Controller,
    Curve,
    usual,
)
from phloem.speculation.texts import Tally


def seconds(rows: int, slope: float = 0.05) -> float:
    """A machine whose steps of up to 8 rows cost little more than one."""
    return 0.004 * (1 + slope * (rows - 1) if rows <= 8 else 1 + 7 * slope + 0.2 * (rows - 8))


def chain(length: int = 7, matched: int = 20, sure: bool = True, tally: Tally | None = None) -> Chain:
    return Chain(length, "own", matched, sure, tally or Tally())


def measured(slope: float = 0.05, sizes: tuple[int, ...] = (1, 4, 8, 16)) -> Controller:
    found = Controller(7, 24)
    for rows in sizes:
        for _ in range(2 * ENOUGH):  # the first ones of a size are believed in part
            found.plain(rows, True, seconds(rows, slope))
    return found


def test_times_are_medians_and_lines_between_them() -> None:
    curve = Curve()
    assert curve.at(3) is None
    for value in (1.0, 1.1, 0.9, 50.0):
        curve.note(1, value)
    assert curve.at(1) == pytest.approx(1.05) and curve.at(8) == pytest.approx(1.05 * usual(8))
    curve.note(8, 99.0)  # the first of a size may have recorded it
    assert curve.at(8) == pytest.approx(LATE * 1.05 * usual(8))
    fresh = Curve()
    fresh.note(4, 99.0, guess=2.0)
    assert fresh.at(4) == 2 * LATE and not fresh.trusted(4)
    for _ in range(8):
        curve.note(8, 2.1)
    assert curve.at(8) == pytest.approx(2.1)
    middle = curve.at(4)
    assert middle is not None and 1.05 < middle < 2.1 and curve.near(7) and not curve.near(4)
    far = curve.at(16)
    assert far == pytest.approx(2.1 + 8 * (2.1 - 1.05) / 7), "rows go on costing what they cost so far"
    assert usual(1) == 1 and usual(12) == pytest.approx((1.5 + 2.9) / 2) and usual(128) > 2 * usual(64) - 1e-9


def test_acceptance_is_learned_by_source_and_match() -> None:
    found = Acceptance()
    before = found.of("own", True, 3)
    for _ in range(200):
        found.note("own", True, 3, False)
        found.note("own", True, 20, True)
    assert before > 0.3 and found.of("own", True, 4) < 0.1 and found.of("own", True, 30) > 0.9
    assert found.of("shared", True, 3) == before > found.of("own", False, 3) > 0


def test_nothing_is_verified_before_plain_steps_were_measured() -> None:
    found = Controller(7, 24)
    assert found.lengths([chain()], True) == [0] and not found.looks(1, True) and not found.on
    for _ in range(ENOUGH):
        found.plain(1, True, seconds(1))
    assert found.looks(1, True) and not found.looks(1, False)


def test_likely_drafts_fill_the_step_up_to_its_knee() -> None:
    found = measured()
    found.look([chain()], True)
    assert found.on and found.lengths([chain()], True) == [7]
    two = found.lengths([chain(), chain()], True)
    assert sum(two) >= 6 and max(two) - min(two) <= 1
    four = found.lengths([chain()] * 4, True)
    assert 4 <= sum(four) <= 8
    assert found.lengths([chain(2), None], True) == [2, 0]


def test_one_row_gets_what_the_search_among_several_rows_gives_it() -> None:
    rng = random.Random(3)
    for _ in range(60):
        found = measured(slope=rng.choice((0.02, 0.1, 0.3)))
        found._most = 23
        for _ in range(rng.randrange(40)):
            found.acceptance.note("own", True, rng.randrange(40), rng.random() < 0.8)
        one = chain(rng.randrange(1, 24), rng.randrange(1, 40), rng.random() < 0.7)
        shares, likely = found._survival(one), 1.0
        for depth, share in enumerate(shares):
            likely *= min(LIKELIEST, found.acceptance.of("own", one.sure or depth > 0, one.matched + depth))
            assert share == pytest.approx(likely)
        assert found.lengths([one], True) == found._best([one, None], 1, True, MARGIN)[:1]


def test_times_that_hardly_move_are_not_worked_out_again() -> None:
    curve = Curve()
    for value in (1.0, 1.001, 1.002, 1.003):
        curve.note(4, value)
    assert curve.version == 1 and curve.at(4) == 1.0
    for _ in range(9):
        curve.note(4, 1.2)
    assert curve.at(4) == 1.2 and curve.near(5) and not curve.near(6) and not curve.near(2)


def test_unlikely_drafts_are_left_alone_where_rows_cost() -> None:
    found = measured(slope=0.3)
    weak = chain(matched=2, sure=False)
    assert found.lengths([weak], True) == [0]
    strong, unsure = found.lengths([chain(), weak], True)
    assert strong > 0 and unsure == 0
    assert measured(slope=1.0).lengths([chain()], True) == [0]


def test_a_request_whose_drafts_fail_gets_shorter_ones() -> None:
    found, tally = measured(0.15), Tally()
    before = found.lengths([chain(tally=tally)], True)
    for _ in range(10):
        found.judged(chain(tally=tally), 7, 0)
    fresh = Controller(7, 24)
    fresh.times = found.times
    assert sum(fresh.lengths([chain(tally=tally)], True)) < sum(before)
    assert tally.right == 0 and tally.expected > 4


def test_only_what_was_reached_is_judged() -> None:
    found, tally = Controller(7, 24), Tally()
    found.judged(chain(matched=20, tally=tally), 5, 2)
    assert found.acceptance.facts() == {"own 17-32": pytest.approx(2 / 3, abs=0.02)}
    assert tally.right == pytest.approx(2, abs=0.1)


def test_it_turns_off_when_nothing_is_drafted() -> None:
    found = measured()
    found.look([chain()], True)
    for _ in range(QUIET):
        assert found.on
        assert found.lengths([None], True) == [0]
    assert not found.on


def lose(found: Controller, slope: float = 0.05) -> None:
    """Verify what never counts until that is stopped."""
    found.look([chain()], True)
    assert found.on
    lost = 0
    while found.on:
        found.verified(1, 8, True, 1, seconds(8, slope))
        lost += 1
    assert lost <= 6


def test_what_does_not_pay_is_stopped_and_soon_again_for_longer_each_time() -> None:
    found = measured()
    rests = list[int]()
    for _ in range(4):
        lose(found)
        rest = 0
        while not found.looks(1, True):
            found.plain(1, True, seconds(1))
            rest += 1
        rests.append(rest)
    assert rests == [0, 2 * BACKOFF, 0, 8 * BACKOFF] and found.stopped == 4


def test_after_a_loss_drafts_have_to_promise_more_for_a_while() -> None:
    found = measured(slope=0.2)
    modest, strong = chain(matched=5), chain()
    assert found.lengths([modest], True)[0] > 0
    lose(found, slope=0.2)
    assert found.lengths([modest], True) == [0] and found.lengths([strong], True)[0] > 0
    for _ in range(BACKOFF):
        found.plain(1, True, seconds(1, 0.2))
    assert found.lengths([modest], True)[0] > 0 and WARY > 1.08


def test_a_step_that_the_machine_delayed_is_not_held_against_drafts() -> None:
    found = measured()
    found.look([chain()], True)
    for _ in range(4):
        found.verified(1, 8, True, 4, seconds(8))
    found.verified(1, 8, True, 4, 50 * seconds(8))
    assert found.on and not found.stopped


def test_longer_drafts_are_verified_where_rows_stay_cheap_and_are_nearly_certain() -> None:
    """Rows that cost a seventh of a step, as on a CPU without units for products: 24 of them give the most."""
    found, tally = Controller(23, 24), Tally()
    for _ in range(ENOUGH):
        found.plain(1, True, 0.0084)
    for rows in (2, 8, 16, 24):
        for _ in range(ENOUGH):
            found.verified(1, rows, True, rows, 0.0084 + 0.0013 * rows)
    for _ in range(40):
        found.judged(chain(23, 32, tally=tally), 23, 23)
    assert found.lengths([chain(23, 32, tally=tally)], True)[0] > 15
    assert found.lengths([chain(23, 5)], True)[0] < 12


def test_drafts_that_seem_not_to_pay_are_tried_now_and_then() -> None:
    found = measured(slope=1.0)
    found.look([chain()], True)
    assert not found.on
    for _ in range(PROBE):
        found.plain(1, True, seconds(1, 1.0))
    found.look([chain()], True)
    assert found.on
    sum_of = sum(found.lengths([chain()], True))
    found.verified(1, 1 + sum_of, True, 1 + sum_of, 0.004)
    assert not found.on, "a probe is one step"


def test_many_rows_are_not_looked_at() -> None:
    found = measured()
    assert found.looks(4, True) and not found.looks(16, True) and not found.looks(9, True)
    assert any(found.looks(8, True) or found.plain(8, True, seconds(8)) for _ in range(9))


def test_beside_a_prompt_every_row_costs_its_computation() -> None:
    found = measured()
    assert found.lengths([chain()], True, beside=256)[0] > 0
    assert found.lengths([chain(matched=2)] * 4, True, beside=256) == [0] * 4


def test_without_adaption_all_drafts_are_verified_always() -> None:
    found = Controller(7, 24, adaptive=False)
    assert found.on and found.lengths([chain(3), None, chain()], True) == [3, 0, 7]
    assert found.lengths([chain()] * 12, True) == [1] * 12
    for _ in range(3 * LEDGER):
        found.verified(1, 8, True, 1, 1.0)
    assert found.on


@pytest.mark.some(16)
@pytest.mark.slow
@pytest.mark.parametrize("right", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("slope", [0.03, 0.15, 0.4, 1.0])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_simulated_run_is_hardly_ever_slower_than_plain_decoding(rows: int, slope: float, right: float) -> None:
    """The drafter always speaks; its drafts are right with this probability, whatever it claims."""
    rng, found = random.Random(rows), Controller(7, 24)
    tallies = [Tally() for _ in range(rows)]
    took, tokens, bubble = 0.0, 0, 0.0002
    for _ in range(3000):
        chains = [chain(tally=tally) for tally in tallies]
        if not found.on:
            found.plain(rows, True, seconds(rows, slope))
            took, tokens = took + seconds(rows, slope), tokens + rows
            if found.looks(rows, True):
                found.look(chains, True)
            continue
        lengths = found.lengths(chains, True)
        given = 0
        for one, length in zip(chains, lengths, strict=True):
            count = 0
            while count < length and rng.random() < right:
                count += 1
            found.judged(one, length, count)
            given += 1 + count
        spent = seconds(rows + sum(lengths), slope) + bubble
        found.verified(rows, rows + sum(lengths), True, given, spent)
        took, tokens = took + spent, tokens + given
    speed = tokens / took * seconds(rows, slope) / rows
    assert speed > 0.98
    if right == 0.9 and slope <= 0.15 and rows == 1:
        assert speed > 2


def modelled(length: int = 5, tally: Tally | None = None) -> Chain:
    return Chain(length, "eagle3", 0, True, tally or Tally(), modelled=True)


def drafting(share: float, accepted: float, steps: int = 600, one: float | None = None) -> tuple[Controller, int]:
    """One request with a model that drafts, of which a pass takes `one` seconds (None: `share` of a plain step):
    (the controller, steps that verified)."""
    rng, found, tally = random.Random(2), Controller(5, 24, share=share), Tally()
    verified, pass_seconds = 0, share * seconds(1) if one is None else one
    for _ in range(steps):
        chain = modelled(tally=tally)
        counts = found.lengths([chain], True) if found.on else [0]
        if not counts[0]:
            found.plain(1, True, seconds(1))
            if found.looks(1, True):
                found.look([modelled(tally=tally)], True)
            continue
        verified, right = verified + 1, 0
        while right < counts[0] and rng.random() < accepted:
            right += 1
        chain.length = counts[0]
        found.judged(chain, counts[0], right)
        took = seconds(1 + counts[0]) + pass_seconds * counts[0]
        found.verified(1, 1 + counts[0], True, 1 + right, took, counts[0], pass_seconds * counts[0])
    return found, verified


def test_a_model_drafts_where_its_passes_pay() -> None:
    found, verified = drafting(share=0.1, accepted=0.8)
    assert verified > 400 and found.on and found.stopped <= 2
    assert found.facts()["pass_ms"] == pytest.approx(0.4) and 0.7 < found.facts()["acceptance"]["eagle3 1"] < 0.9


def test_a_model_whose_passes_take_too_long_or_that_is_never_right_is_turned_off() -> None:
    """Thought to be cheap, and measured to be dear: the time of drafting counts."""
    for share, accepted, one in ((0.05, 0.8, 0.012), (0.1, 0.0, None)):
        found, verified = drafting(share, accepted, one=one)
        assert not found.on and 1 <= verified < 30, (verified, found.facts())


def test_longer_chains_of_a_model_are_verified_the_cheaper_its_passes_are() -> None:
    lengths = list[int]()
    for share in (0.02, 0.1, 0.25, 0.9):
        found = measured()
        found._share = share
        (length,) = found._best([modelled()], 1, True, 1.0)
        lengths.append(length)
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[2] and lengths[-1] == 0
