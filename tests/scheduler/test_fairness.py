"""Each client gets its part: orders by hand, against a plain model, in the scheduler, and over HTTP's head."""

from __future__ import annotations

import random

import pytest

from phloem.core.messages import Submit, pack_ids
from phloem.core.request import SamplingParams
from phloem.scheduler.fairness import OUTPUT, SWEEP, FairQueue, client_of
from phloem.scheduler.state import Request
from phloem.simulation.clockwork import Measured
from phloem.simulation.fleet import Fleet
from phloem.simulation.replica import Size
from phloem.simulation.traces import Conversation
from phloem.testing.driver import Driver


def request(number: int, key: str, tokens: int = 10, new: int = 0, at: float = 0.0, user: str = "") -> Request:
    params = SamplingParams(max_new_tokens=new)
    submit = Submit(id=f"r{number}", input_ids=pack_ids([11] * tokens), sampling=params, key=key, user=user)
    made = Request(submit, at)
    made.seq, made.key, made.limit = number, at, tokens + new
    return made


def busy() -> FairQueue:
    """One that is never empty: a request of somebody else runs."""
    queue = FairQueue("key")
    other = request(10**6, "z", 1)
    queue.add(other)
    queue.take(other)
    return queue


def ids(queue: FairQueue, count: int = 100) -> list[str]:
    return [one.submit.key + one.id[1:] for one in queue.front(count)]


def test_clients_are_told_apart_as_asked() -> None:
    submit = Submit(id="a", input_ids=b"", sampling=SamplingParams(), key="k", user="u")
    assert client_of("key", submit) == "k" and client_of("user", submit) == "u"
    submit.user = ""
    assert client_of("user", submit) == "k"


def test_clients_take_turns_by_the_work_that_they_bring() -> None:
    queue = FairQueue("key")
    for number in range(4):
        queue.add(request(number, "a", 20))
    for number in range(4, 10):
        queue.add(request(number, "b", 10))
    assert ids(queue) == ["a0", "b4", "b5", "a1", "b6", "b7", "a2", "b8", "b9", "a3"]
    assert ids(queue, 3) == ["a0", "b4", "b5"]
    assert len(queue) == len(queue.everything()) == 10 and queue.tokens == 140


def test_who_comes_back_has_saved_nothing_up() -> None:
    queue = busy()
    first = request(0, "b")
    queue.add(first)
    queue.take(first)
    queue.ended(first)
    for number in range(1, 30):
        one = request(number, "a", 100)
        queue.add(one)
        queue.take(one)
        queue.ended(one)
    for number in range(30, 34):
        queue.add(request(number, "a", 10))
        queue.add(request(number + 10, "b", 10))
    order = ids(queue)
    # `b` was idle while `a` had 2,900 tokens: it is ahead by the last of them alone, not by all.
    assert order.index("a30") <= 4 and {"b40", "b41"} <= set(order[:4])


def test_answers_are_charged_at_once_and_put_right_at_the_end() -> None:
    queue = busy()
    long, short = request(0, "a", 10, 1000), request(1, "b", 10, 1000)
    for one in (long, short):
        queue.add(one)
        queue.take(one)
    assert queue.charges() == {"z": 1, "a": 10 + OUTPUT * 128, "b": 10 + OUTPUT * 128}
    long.output, short.output = [7] * 500, [7] * 3
    for one in (long, short):
        queue.ended(one)
        queue.ended(one)  # told twice, it counts once
    assert queue.charges() == {"z": 1, "a": 10 + OUTPUT * 500, "b": 10 + OUTPUT * 3}


def test_a_preempted_request_is_charged_once() -> None:
    queue = busy()
    one = request(0, "a", 10)
    for _ in range(3):
        queue.add(one)
        queue.take(one)
    queue.ended(one)
    assert queue.charges() == {"z": 1, "a": 10} and len(queue) == queue.tokens == 0


def test_the_tokens_ahead_are_those_of_a_fair_share() -> None:
    queue = FairQueue("key")
    for number in range(50):
        queue.add(request(number, "a", 100))
    queue.add(request(60, "c", 30))
    new = request(61, "b", 20).submit
    assert queue.ahead(new, 20) == 20 + 20  # as much of `a`, and of `c`, as of the new one
    assert queue.ahead(request(62, "a").submit, 10) == 5000 + 30
    assert queue.has_share(new, 10) and not queue.has_share(request(62, "a").submit, 10)


def test_clients_that_have_nothing_here_are_forgotten() -> None:
    queue = busy()
    for number in range(3 * SWEEP):
        one = request(number, f"k{number}", 10)
        queue.add(one)
        queue.take(one)
        queue.ended(one)
    assert len(queue.charges()) <= SWEEP


def test_once_nobody_is_here_all_begin_anew() -> None:
    queue = FairQueue("key")
    for at, key in enumerate("ab"):
        one = request(at, key, 10)
        queue.add(one)
        queue.take(one)
        queue.ended(one)
    assert queue.charges() == {}


@pytest.mark.parametrize("seed", range(5))
def test_no_client_that_waits_falls_behind_by_more_than_the_largest_request(seed: int) -> None:
    """Of clients that always have something waiting, what is served differs by at most two requests' work."""
    rng, queue, served = random.Random(seed), FairQueue("key"), dict.fromkeys("abcd", 0)
    number = 0
    for _ in range(400):
        for key in "abcd":
            while sum(one.submit.key == key for one in queue.everything()) < 3:
                queue.add(request(number, key, rng.randrange(1, {"a": 200, "b": 20}.get(key, 60)), at=float(number)))
                number += 1
        chosen = queue.front(1)[0]
        queue.take(chosen)
        queue.ended(chosen)
        served[chosen.submit.key] += chosen.num_prompt
        assert max(served.values()) - min(served.values()) <= 2 * 200
    with pytest.raises(KeyError):
        queue.remove(request(number, "a"))


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "priority", "deadline"])
def test_a_thousand_requests_of_one_key_do_not_starve_another(policy: str) -> None:
    def first_end(fair: str) -> int:
        """How many of the others have ended before the only request of the second key."""
        driver = Driver(fair=fair, max_slots=4, num_pages=400, schedule_policy=policy, debug_invariants=False)
        for index in range(1000):
            driver.submit(f"a{index}", [11, 12, 13 + index % 7, index], 2, key="a", ignore_eos=True)
        driver.step(3)
        driver.submit("b", [11, 12, 500], 2, key="b", ignore_eos=True)
        while "b" not in driver.finish:
            driver.step()
        ended = len(driver.finish)
        driver.run()
        assert len(driver.finish) == 1001 and all(end.type == "length" for end in driver.finish.values())
        assert driver.tokens["b"] == driver.expected([11, 12, 500], 2)
        return ended

    assert first_end("key") < 30 < 900 < first_end("none")


def test_a_queue_that_one_key_has_filled_lets_others_in() -> None:
    driver = Driver(fair="key", max_slots=1, max_queued_requests=8)
    for index in range(12):
        driver.submit(f"a{index}", [11, 12, index + 13], 2, key="a")
    for index in range(6):
        driver.submit(f"b{index}", [11, 12, index + 13], 2, key="b")
    driver.run()
    refused = [name for name, end in driver.finish.items() if end.status_code == 503]
    assert sorted(refused) == ["a10", "a11", "a8", "a9", "b4", "b5"]


def test_who_waits_for_little_is_not_refused_for_the_queue_of_another() -> None:
    driver = Driver(fair="key", num_pages=800, max_slots=1, max_queue_seconds=2.0, chunked_prefill_size=16)
    driver.scheduler.meter.prefill_tokens, driver.scheduler.meter.prefill_seconds = 1000, 10.0
    for index in range(5):
        driver.submit(f"a{index}", [12 + index, *range(11, 110)], 2, key="a")
    driver.submit("b", [11, 12, 13], 2, key="b")
    driver.run()
    assert [driver.finish[name].status_code for name in ("a0", "a1", "a2", "a3", "a4", "b")] == [
        *[None] * 3, 503, 503, None,
    ]  # fmt: skip


def test_aborted_and_failed_requests_leave_no_trace() -> None:
    driver = Driver(fair="user", max_slots=2)
    for index in range(8):
        driver.submit(f"a{index}", [11, 12, index + 13], 30, user=f"u{index % 3}", ignore_eos=True)
    driver.step(4)
    for index in (0, 5, 7):
        driver.abort(f"a{index}")
    driver.run()
    queue = driver.scheduler.queue
    assert isinstance(queue, FairQueue) and queue.tokens == len(queue) == 0
    assert all(client.idle for client in queue.clients())


@pytest.mark.slow
def test_under_load_each_key_gets_its_part_in_virtual_time() -> None:
    """One key brings ten times as much as can be computed; ten others bring little."""

    def ran(fair: str) -> list[float]:
        size = Size(40_000, 16, 16, 2048, 512, "fcfs", fair="user" if fair else "none")
        talks = [Conversation(n, n * 0.01, [(500, 8, 0.0)], user="greedy", tier="greedy") for n in range(600)]
        talks += [Conversation(1000 + n, n * 0.5 + 0.3, [(200, 8, 0.0)], user="m", tier="modest") for n in range(10)]
        steps = Measured(step=0.0, weights=0.010, token=0.0002, row=0.0, read=0.0, pair=0.0)
        seen = Fleet(size, steps, 1, "round_robin").run(sorted(talks, key=lambda talk: talk.start))
        assert len(seen.e2e) == 610
        return seen.tiers["modest"]

    assert max(ran("user")) < 1.0 < 5.0 < max(ran(""))
