"""What a request waits for may come late, never, or twice, before it runs or while it does; and work between steps."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from phloem.core.errors import BadRequest, PhloemError, QueueFull
from phloem.core.late import Prepared
from phloem.core.messages import Control
from phloem.core.request import FinishReason, RequestStatus
from phloem.scheduler.state import LATE
from phloem.testing.driver import Driver, random_tokens, storm
from phloem.testing.fake_runner import draw

both = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


class Tier:
    """A toy tier of the cache: a fetch is answered when the test says so, well or not, as often as it likes."""

    def __init__(self) -> None:
        self.answers = 0
        self.asked = 0
        self.error: PhloemError | None = None

    def answer(self, error: PhloemError | None = None) -> None:
        self.answers += 1
        self.error = error

    def ready(self) -> bool:
        self.asked += 1
        return self.answers > 0


def tokens_of(driver: Driver, name: str) -> list[int]:
    return driver.tokens.get(name, [])


def test_a_request_waits_for_all_of_several() -> None:
    first, second = Tier(), Tier()
    driver = Driver(prepare=lambda submit, prompt: Prepared((first, second)))
    driver.submit("a", [11, 12, 13], 5)
    driver.step(3)
    first.answer()
    driver.step(3)
    assert driver.scheduler.live["a"].status is RequestStatus.WAITING_ON and first.asked == 4
    second.answer()
    driver.run()
    assert driver.tokens["a"] == driver.expected([11, 12, 13], 5)


def test_one_that_is_lost_ends_the_request_once_whatever_the_others_say() -> None:
    first, second, third = Tier(), Tier(), Tier()
    driver = Driver(prepare=lambda submit, prompt: Prepared((first, second, third)))
    driver.submit("a", [11, 12, 13], 5)
    driver.step()
    first.answer(QueueFull("the tier is full"))
    second.answer(BadRequest("no such page"))
    driver.step()
    assert driver.finish["a"] == FinishReason("abort", message="the tier is full", status_code=503)
    third.answer()
    driver.run()
    assert len(driver.chunks["a"]) == 1 and third.asked == 2


@both
def test_answered_twice_counts_once(overlap: bool) -> None:
    tier = Tier()
    driver = Driver(overlap=overlap, prepare=lambda submit, prompt: Prepared((tier, tier)))
    driver.submit("a", [11, 12, 13], 5)
    tier.answer()
    driver.step(2)
    tier.answer(BadRequest("lost after all"))
    tier.answer()
    driver.run()
    assert driver.tokens["a"] == driver.expected([11, 12, 13], 5)
    assert driver.scheduler.num_waiting == 0 and not driver.scheduler.late


@both
def test_after_admission_the_slot_is_held_until_it_is_ready(overlap: bool) -> None:
    driver = Driver(overlap=overlap)
    driver.submit("a", [11, 12, 13], 20)
    driver.submit("b", [21, 22, 23], 20)
    driver.step(4)
    tier = Tier()
    driver.scheduler.wait_for("a", tier)
    driver.step(2)  # what is in flight is committed
    count, held = len(driver.tokens["a"]), driver.cache.held_pages
    driver.step(5)
    assert len(driver.tokens["a"]) == count and driver.scheduler.live["a"].slot >= 0
    assert len(driver.tokens["b"]) >= count + 5 and driver.cache.held_pages >= held
    assert driver.scheduler.slots.num_held(LATE) == 1 and driver.scheduler.num_waiting == 0
    tier.answer()
    tier.answer()
    driver.run()
    for name, prompt in (("a", [11, 12, 13]), ("b", [21, 22, 23])):
        assert driver.tokens[name] == driver.expected(prompt, 20)


@both
def test_lost_after_admission_ends_the_request_alone(overlap: bool) -> None:
    driver = Driver(overlap=overlap)
    driver.submit("a", [11, 12, 13], 20)
    driver.submit("b", [21, 22, 23], 20)
    driver.step(4)
    tier = Tier()
    driver.scheduler.wait_for("a", tier)
    driver.step(3)
    tier.answer(BadRequest("the page is gone"))
    driver.run()
    assert driver.finish["a"].message == "the page is gone"
    assert driver.tokens["b"] == driver.expected([21, 22, 23], 20)
    with pytest.raises(KeyError):
        driver.scheduler.wait_for("a", Tier())


def test_one_that_is_in_the_queue_leaves_it_meanwhile() -> None:
    driver, tier = Driver(max_slots=1), Tier()
    for name in "abc":
        driver.submit(name, [11, 12, ord(name)], 6)
    driver.scheduler.wait_for("b", tier)
    assert driver.scheduler.num_waiting == 3
    driver.step(20)
    assert set(driver.finish) == {"a", "c"} and driver.scheduler.num_waiting == 1
    tier.answer()
    driver.run()
    assert driver.tokens["b"] == driver.expected([11, 12, ord("b")], 6)


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(6))
def test_fetches_at_any_moment_under_pressure(overlap: bool, seed: int) -> None:
    """Preempted, retracted, aborted or rolled back while they wait: each gives its own answer, or its own failure."""
    rng = random.Random(seed)
    tiers: list[tuple[str, Tier, bool]] = []

    def prepare(submit: Any, prompt: Any) -> Prepared | None:
        if rng.random() < 0.5:
            return None
        tier = Tier()
        tiers.append((submit.id, tier, rng.random() < 0.15))
        return Prepared((tier,))

    driver = Driver(
        num_pages=24,
        overlap=overlap,
        chunked_prefill_size=16,
        prepare=prepare,
        starve=lambda batch: batch.num_tokens > 1 and rng.random() < 0.05,
    )
    driver.scheduler.planner.headroom.share = 0.0
    want = storm(driver, 40, rng, longest=30)
    lost, aborted = set[str](), set[str]()
    while driver.scheduler.live:
        if rng.random() < 0.3:
            name = rng.choice(list(driver.scheduler.live))
            tier = Tier()
            tiers.append((name, tier, rng.random() < 0.05))
            driver.scheduler.wait_for(name, tier)
        if rng.random() < 0.05:
            driver.scheduler.retract_all()
        if rng.random() < 0.02:
            name = rng.choice(list(driver.scheduler.live))
            aborted.add(name)
            driver.abort(name)
        for item in [item for item in tiers if rng.random() < 0.3]:
            name, tier, bad = item
            tiers.remove(item)
            lost |= {name} if bad and name in driver.scheduler.live else set()
            tier.answer(BadRequest("lost") if bad else None)
        driver.step()
    driver.run()
    for name, answer in want.items():
        got = tokens_of(driver, name)
        if name in driver.finish and driver.finish[name].type != "abort":
            assert got == answer, name
        else:
            assert name in lost | aborted and got == answer[: len(got)], name
    assert sum(reason.type != "abort" for reason in driver.finish.values()) >= 10


# work between steps


@both
def test_weights_change_between_two_steps_under_load(overlap: bool) -> None:
    driver = Driver(overlap=overlap, max_slots=4, chunked_prefill_size=16)
    rng = random.Random(3)
    prompts = {f"q{index}": random_tokens(rng, rng.randrange(3, 30)) for index in range(8)}
    for index, (name, prompt) in enumerate(prompts.items()):
        driver.submit(name, prompt, 25, seed=index)
    driver.step(7)
    count = {name: len(tokens_of(driver, name)) for name in prompts}
    flying = len(driver.scheduler.inflight)

    def update() -> str:
        driver.runner.weights = 1000
        return "v2"

    pending = driver.scheduler.between(update)
    driver.scheduler.weight_version = "v2"
    driver.run()
    assert pending.done() and pending.result() == "v2"
    changed = 0
    for index, (name, prompt) in enumerate(prompts.items()):
        tokens = [*prompt, *driver.tokens[name]]
        by = [
            {
                weights
                for weights in (0, 1000)
                if token == draw([np.array(tokens[:at], np.int32)], index + weights, 1000)
            }
            for at, token in enumerate(tokens[len(prompt) :], start=len(prompt))
        ]
        assert all(by), "a token of neither"
        first = next((at for at, weights in enumerate(by) if 0 not in weights), len(by))
        assert all(1000 in weights for weights in by[first:]), "old weights after new ones"
        assert count[name] <= first <= count[name] + flying or count[name] == 0
        changed += first < len(by)
    assert changed >= 4


@both
def test_a_weight_is_read_with_steps_in_flight_behind_what_changes_it(overlap: bool) -> None:
    driver = Driver(overlap=overlap)
    driver.submit("a", [11, 12, 13], 20)
    driver.step(3)
    read: dict[str, Any] = {"name": "weights", "rows": 5}
    driver.scheduler.receive(Control(id="before", name="get_weights_by_name", args=read))
    driver.scheduler.between(lambda: setattr(driver.runner, "weights", 7))
    for name, args in (("after", read), ("unknown", {**read, "name": "x"}), ("none", {**read, "rows": 0})):
        driver.scheduler.receive(Control(id=name, name="get_weights_by_name", args=args))
    assert driver.scheduler.busy
    driver.run()
    assert driver.replies["before"].data == {"weight": [[0.0]]} and driver.replies["after"].data == {"weight": [[7.0]]}
    assert not driver.replies["unknown"].ok and driver.replies["unknown"].message == "no weight is called 'x'"
    assert not driver.replies["none"].ok and "above 0" in driver.replies["none"].message
    assert len(driver.tokens["a"]) == 20


def test_prefixes_of_other_weights_are_not_shared() -> None:
    driver = Driver()
    prompt = random_tokens(random.Random(3), 20)
    driver.submit("old", prompt, 2)
    driver.run()
    driver.submit("waits", prompt, 2)  # accepted before, admitted after
    driver.scheduler.weight_version = "2"
    driver.run()
    driver.submit("new", prompt, 2)
    driver.submit("salted", prompt, 2, namespace="s")
    driver.run()
    cached = {name: chunks[0].cached_tokens for name, chunks in driver.chunks.items()}
    assert cached == {"old": 0, "waits": 0, "new": 16, "salted": 0}
    driver.scheduler.weight_version = ""
    driver.submit("back", prompt, 2)
    driver.run()
    assert driver.chunks["back"][0].cached_tokens == 16


def test_a_call_is_answered_when_its_work_between_steps_has_ended() -> None:
    driver = Driver(overlap=True)
    driver.submit("a", [11, 12, 13], 20)
    driver.step(3)

    def fail() -> None:
        raise ValueError("no such tensor")

    controls = driver.scheduler.controls
    controls.between("good", lambda: 8, lambda result: (f"{result} tensors", {"count": result}))
    controls.between("bad", fail, lambda result: ("", {}))
    assert driver.scheduler.busy and controls.waiting and not driver.replies
    driver.step()
    assert (driver.replies["good"].ok, driver.replies["good"].message) == (True, "8 tensors")
    assert driver.replies["good"].data == {"count": 8}
    assert (driver.replies["bad"].ok, driver.replies["bad"].message) == (False, "ValueError: no such tensor")
    driver.run()
    assert driver.tokens["a"] == driver.expected([11, 12, 13], 20)
