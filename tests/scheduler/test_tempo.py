"""Targets: due times of first tokens, who stands back, and steps that are short enough for tokens to come in time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from phloem.core.errors import ConfigError
from phloem.core.targets import Target, Targets
from phloem.scheduler.tempo import AIM, LATE_SECONDS, LEAST, USUAL_TTFT, Tempo
from phloem.simulation.clockwork import Measured
from phloem.simulation.fleet import Fleet
from phloem.simulation.replica import Size
from phloem.simulation.traces import Conversation
from phloem.testing.driver import Driver

FLEX = Targets(Target(0.5, 0.05), {"flex": Target(60.0)})
# A step reads weights for 10 ms, in whose shadow 50 prompt tokens are free; each further one takes 0.2 ms.
STEPS = Measured(step=0.0, weights=0.010, token=0.0002, row=0.0, read=0.0, pair=0.0)


def test_targets_are_those_of_the_request_of_its_class_or_the_usual_ones() -> None:
    found = Targets.parse('{"ttft_ms": 500, "itl_ms": 50, "tiers": {"flex": {"ttft_ms": 60000}}}')
    assert found == FLEX and found.any_itl
    assert found.of("", 0, 0) == found.of("unknown", 0, 0) == Target(0.5, 0.05)
    assert found.of("flex", 0, 0) == Target(60.0, 0.0) and found.of("flex", 2.0, 0.1) == Target(2.0, 0.1)
    assert Targets.parse(None) == Targets() and not Targets().any_itl


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected JSON"),
        ("[1]", "expected an object"),
        ('{"ttft": 5}', "unknown ttft"),
        ('{"ttft_ms": 0}', "not above 0"),
        ('{"itl_ms": true}', "True"),
        ('{"ttft_ms": 1e999}', "inf"),
        ('{"tiers": {"a": 5}}', "tiers"),
        ('{"tiers": {"a": {"itl_ms": -1}}}', r"tiers\.a\.itl_ms"),
    ],
)
def test_what_is_no_target_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Targets.parse(text)


def waits(driver: Driver) -> list[str]:
    return [request.id for request in driver.scheduler.queue.front(100)]


def test_who_is_due_first_goes_first() -> None:
    driver = Driver(schedule_policy="deadline", targets=FLEX, max_slots=1)
    driver.submit("running", [11, 12], 5, ignore_eos=True)
    driver.step()
    driver.submit("flex", [21, 22], 2, tier="flex")
    driver.submit("usual", [31, 32], 2)
    driver.submit("hasty", [41, 42], 2, ttft=0.2)
    driver.submit("patient", [51, 52], 2, ttft=3.0)
    assert waits(driver) == ["hasty", "usual", "patient", "flex"]
    driver.run()
    ends = {name: at for at, message in enumerate(driver.sent) for name in named(message)}
    assert sorted(("flex", "usual", "hasty", "patient"), key=ends.__getitem__) == ["hasty", "usual", "patient", "flex"]


def named(message: Any) -> list[str]:
    return [chunk.id for chunk in getattr(message, "chunks", []) if chunk.finish is not None]


def test_without_targets_a_long_prompt_is_given_the_time_that_it_takes() -> None:
    driver = Driver(schedule_policy="deadline", max_slots=1, num_pages=400)
    meter = driver.scheduler.meter
    meter.prefill_tokens, meter.prefill_seconds = 1000, 10.0
    driver.submit("long", list(range(11, 311)), 2)
    driver.submit("short", [11, 12], 2)
    assert waits(driver) == ["short", "long"]
    long = driver.scheduler.live["long"]
    assert long.due == pytest.approx(long.received + USUAL_TTFT + 3.0)


def test_who_is_late_stands_back_once() -> None:
    driver = Driver(schedule_policy="deadline", max_slots=1, targets=Targets(Target(0.5)))
    meter = driver.scheduler.meter
    meter.prefill_tokens, meter.prefill_seconds = 1000, 1.0
    driver.submit("running", [11, 12], 300, ignore_eos=True)
    driver.step()
    driver.submit("old", [21, 22], 2)
    driver.clock.now += 0.6
    driver.submit("new", [31, 32], 2)
    driver.step()
    assert waits(driver) == ["new", "old"] and driver.scheduler.live["old"].late
    # It keeps its place among later ones: whoever comes when it has waited long enough stands behind it.
    driver.clock.now += LATE_SECONDS
    driver.submit("later", [41, 42], 2)
    driver.step()
    assert waits(driver) == ["old", "new", "later"] or waits(driver) == ["old", "later", "new"]
    driver.run()


def test_a_promise_between_tokens_bounds_the_prompts_of_a_step() -> None:
    tempo = Tempo()
    assert tempo.prompt_tokens(0.02, 512) == 512  # nothing is known yet
    tempo.took(512, 0, 0.1024)  # 0.2 ms a token, in a step of prompts alone
    assert tempo.prompt_tokens(0.02, 512) == int(AIM * 0.02 / 0.0002)
    for _ in range(60):
        tempo.took(0, 8, 0.010)
    assert tempo.decode == pytest.approx(0.010)
    assert tempo.prompt_tokens(0.02, 512) == pytest.approx((AIM * 0.02 - 0.010) / 0.0002, abs=1)
    # Where the promise cannot be kept at all, prompts still go on.
    assert tempo.prompt_tokens(0.001, 512) == LEAST and tempo.prompt_tokens(0.001, 3) == 3


def test_small_prompts_in_the_shadow_of_weights_do_not_make_large_ones_look_cheap() -> None:
    """As texts of 60 tokens come beside a long one."""
    tempo, most, times = Tempo(), 4096, list[float]()
    tempo.took(0, 8, STEPS(8, 8, 8, 0, 0, 0))
    tempo.took(30, 8, STEPS(38, 8, 8, 0, 0, 0))
    for step in range(300):
        allowed = tempo.prompt_tokens(0.020, most)
        count = min(allowed, 60) if step % 4 else allowed
        seconds = STEPS(count + 8, 9, 8, 0, 0, 0)
        times.append(seconds)
        tempo.took(count, 8, seconds)
    assert max(times) <= 0.022 and max(times[20:]) <= 0.020 and max(times[60:]) > 0.015


def test_rows_without_a_promise_leave_steps_as_they_are() -> None:
    driver = Driver(chunked_prefill_size=64, num_pages=400)
    driver.submit("a", [11, 12], 20)
    driver.run()
    assert driver.scheduler.planner.tempo is None
    driver.submit("b", [11, 12], 20, itl=0.05, ignore_eos=True)
    driver.submit("c", [11, 12], 20, ignore_eos=True)
    driver.step(3)
    tempo = driver.scheduler.planner.tempo
    assert tempo is not None
    slots = driver.scheduler.slots
    for _ in range(200):
        tempo.took(0, 2, 0.01)
        tempo.took(40, 2, 0.05)
    assert tempo.within(slots, 64) == int((AIM * 0.05 - 0.01) / 0.001 + 1e-6)
    driver.abort("b")
    driver.step()
    assert tempo.within(slots, 64) == 64


FAST = replace(STEPS, token=0.00005)


def fleet(tokens: int, **more: Any) -> tuple[Any, Fleet]:
    """Texts of the workload W3, some 30 at a time, beside a prompt of so many tokens a second."""
    size = Size(kv_tokens=200_000, page_size=16, max_running=64, context=9000, chunk=2048, schedule_policy="fcfs")
    found = Fleet(replace(size, **more), FAST, 1, "round_robin")
    talks = [Conversation(n, n / 17, [(256, 128, 0.0)], tier="chat") for n in range(340)]
    talks += [Conversation(1000 + n, n + 2.0, [(tokens, 1, 0.0)], tier="long") for n in range(16 if tokens else 0)]
    return found.run(sorted(talks, key=lambda talk: talk.start)), found


@pytest.mark.slow
def test_long_prompts_do_not_hold_up_those_who_are_promised_a_token() -> None:
    usual = fleet(0)[0].gaps.percentile(0.99)
    held, _ = fleet(8192)
    kept, _ = fleet(8192, targets=Targets(Target(), {"chat": Target(2.0, 2 * usual)}))
    assert held.gaps.percentile(0.99) > 3 * usual
    assert kept.gaps.percentile(0.99) <= 2 * usual
    # Nothing is lost: all are answered, and the long ones in a time that can be told.
    assert len(kept.e2e) == len(held.e2e) == 356 and not kept.failed
    assert max(kept.tiers["long"]) < 5.0


@pytest.mark.slow
def test_more_prompts_than_can_be_in_time_leave_those_in_time_that_can_be() -> None:
    """Twice as much as is computed for two seconds: by arrival nearly all are late."""

    def ran(policy: str) -> tuple[int, int]:
        size = Size(20_000, 16, 32, 2048, 512, policy, targets=Targets(Target(0.5)))
        talks = [Conversation(n, n * 0.05, [(500, 2, 0.0)]) for n in range(160)]
        seen = Fleet(size, STEPS, 1, "round_robin").run(talks)
        return sum(seconds <= 0.5 for seconds in seen.ttft), len(seen.e2e)

    (first, all_first), (due, all_due) = ran("fcfs"), ran("deadline")
    assert all_first == all_due == 160
    assert due > 5 * first and due >= 70
