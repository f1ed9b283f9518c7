"""The scheduler over a runner whose tokens betray any wrong page, checked against a straight-line oracle."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.core.batch import StepOutput
from phloem.core.messages import Abort, Tokens
from phloem.core.request import FinishReason
from phloem.scheduler.metrics import Meter
from phloem.testing.driver import EOS, Driver, random_tokens, storm
from phloem.testing.fake_runner import logprob, oracle

both = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


# answers


@both
@pytest.mark.parametrize("policy", ["fcfs", "lpm", "priority"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_answers_equal_the_oracle(overlap: bool, policy: str, page_size: int) -> None:
    driver = Driver(page_size=page_size, num_pages=1200 // page_size, overlap=overlap, schedule_policy=policy)
    want = storm(driver, 40, random.Random(page_size))
    driver.run()
    assert driver.tokens == want
    assert {reason.type for reason in driver.finish.values()} == {"stop", "length"}


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(6))
def test_preemption_storms_in_a_tiny_pool(overlap: bool, seed: int) -> None:
    driver = Driver(num_pages=20, overlap=overlap, chunked_prefill_size=16)
    driver.scheduler.planner.headroom.share = 0.0
    want = storm(driver, 30, random.Random(seed), longest=30)
    driver.run()
    assert driver.tokens == want
    assert driver.scheduler.planner.preemptions > 0 and driver.cache.evicted_pages > 0


@both
@pytest.mark.parametrize("cache", [False, True])
def test_chunked_prefill_gives_the_same_tokens(overlap: bool, cache: bool) -> None:
    driver = Driver(overlap=overlap, cache=cache, chunked_prefill_size=8)
    prompt = random_tokens(random.Random(1), 100)
    driver.submit("a", prompt, 5)
    driver.submit("b", prompt, 5, seed=9)
    driver.run()
    assert driver.tokens == {"a": driver.expected(prompt, 5), "b": driver.expected(prompt, 5, 9)}
    assert driver.runner.max_tokens == 8


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(3))
def test_steps_that_go_on_from_the_last_are_those_that_would_be_planned(
    overlap: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(shortcut: bool) -> tuple[list[tuple[Any, ...]], int, dict[str, list[int]]]:
        driver = Driver(num_pages=24, page_size=16, overlap=overlap, chunked_prefill_size=16)
        planner, launched, taken = driver.scheduler.planner, list[tuple[Any, ...]](), [0]
        launch, next_batch = driver.runner.launch, planner.next_batch

        def record(batch: Any) -> Any:
            arrays = (batch.slots, batch.query_lens, batch.prefix_lens, batch.input_ids, *batch.tables, batch.outputs)
            launched.append((batch.step, batch.epoch, *((array.tolist(), array.dtype) for array in arrays)))
            return launch(batch)

        def count() -> Any:
            plan = next_batch()
            taken[0] += plan is not None and plan.steady
            return plan

        monkeypatch.setattr(driver.runner, "launch", record)
        monkeypatch.setattr(planner, "next_batch", count)
        if not shortcut:
            monkeypatch.setattr(planner, "_one_more", lambda: None)
        rng = random.Random(seed)
        for turn in range(250):
            if turn % 25 == 0:
                driver.submit(f"r{turn}", random_tokens(rng, rng.randrange(1, 40)), rng.randrange(1, 120), turn)
            if rng.random() < 0.01:
                driver.abort(str(rng.choice([*driver.scheduler.live, "none"])))
            driver.step()
        driver.run()
        return launched, taken[0], driver.tokens

    quick, steps, answers = batches(True)
    planned, none, same = batches(False)
    assert steps > 20 and none == 0
    assert quick == planned and answers == same


def test_overlap_launches_before_the_token_is_known() -> None:
    driver = Driver(overlap=True)
    driver.submit("a", [11, 12], 5)
    driver.step()
    assert len(driver.scheduler.inflight) == 1 and not driver.tokens
    driver.step()
    assert len(driver.scheduler.inflight) == 1 and len(driver.tokens["a"]) == 1


@both
def test_a_token_after_the_end_is_dropped(overlap: bool) -> None:
    driver = Driver(overlap=overlap)
    driver.runner.force["a"] = {4: EOS}
    driver.submit("a", [11, 12], 9)
    driver.run()
    assert driver.tokens["a"][-1] == EOS and len(driver.tokens["a"]) == 3
    assert driver.finish["a"] == FinishReason("stop", matched=EOS)


def test_a_request_that_surely_ends_is_not_launched_in_vain() -> None:
    driver = Driver(overlap=True)
    driver.submit("a", [11, 12], 4)
    driver.run()
    assert driver.runner.computed["a"] == 2 + 3


# sharing


@both
def test_shared_prefixes_that_arrive_together_are_computed_once(overlap: bool) -> None:
    driver = Driver(num_pages=600, max_slots=16, overlap=overlap, chunked_prefill_size=64)
    rng = random.Random(2)
    for group in range(2):
        prefix = random_tokens(rng, 128)
        for index in range(8):
            driver.submit(f"{group}-{index}", prefix + random_tokens(rng, 4), 4)
    driver.run()
    # Each group: its prefix once, then for each member 4 own tokens and 3 of its output.
    assert driver.runner.computed_tokens == 2 * (128 + 8 * 7)
    cached = [driver.chunks[name][0].cached_tokens for name in driver.tokens]
    assert sorted(cached) == [0, 0] + [128] * 14


def test_without_a_cache_everyone_computes_alone() -> None:
    driver = Driver(cache=False)
    prefix = random_tokens(random.Random(2), 40)
    for index in range(4):
        driver.submit(str(index), [*prefix, 8 + index], 1)
    driver.run()
    assert driver.runner.computed_tokens == 4 * 41


def test_the_next_turn_of_a_conversation_hits_the_answer() -> None:
    driver = Driver()
    prompt = random_tokens(random.Random(3), 10)
    driver.submit("one", prompt, 10)
    driver.run()
    turn = prompt + driver.tokens["one"] + [50, 51]
    driver.submit("two", turn, 3)
    driver.run()
    # 20 known tokens, of which the last was never computed: four whole pages of 4.
    assert driver.chunks["two"][0].cached_tokens == 16
    assert driver.tokens["two"] == driver.expected(turn, 3)


def test_namespaces_do_not_share() -> None:
    driver = Driver()
    prompt = random_tokens(random.Random(3), 20)
    for index, salt in enumerate(["a", "b", "a"]):
        driver.submit(str(index), prompt, 2, namespace=salt)
        driver.run()
    assert [driver.chunks[str(index)][0].cached_tokens for index in range(3)] == [0, 0, 16]


@pytest.mark.parametrize("eviction", ["lru", "lfu", "fifo"])
def test_every_eviction_keeps_answers_right(eviction: str) -> None:
    driver = Driver(num_pages=30, eviction=eviction)
    want = storm(driver, 40, random.Random(8))
    driver.run()
    assert driver.tokens == want and driver.cache.evicted_pages > 0


# how requests end


def test_ends() -> None:
    driver = Driver(context_length=20)
    driver.runner.force["stop"] = {5: 3}
    driver.runner.force["ignore"] = {5: EOS}
    driver.runner.force["min"] = {3: EOS, 6: EOS}
    driver.submit("stop", [11, 12], 9, stop_token_ids=[3])
    driver.submit("ignore", [11, 13], 9, ignore_eos=True)
    driver.submit("min", [11, 14], 9, min_new_tokens=4)
    driver.submit("context", [11, 15], None)
    driver.submit("none", [11, 16], 0)
    driver.run()
    assert driver.finish["stop"] == FinishReason("stop", matched=3) and len(driver.tokens["stop"]) == 4
    assert driver.finish["ignore"] == FinishReason("length", length=9)
    assert driver.finish["min"] == FinishReason("stop", matched=EOS) and len(driver.tokens["min"]) == 5
    assert driver.finish["context"] == FinishReason("length", length=18)
    assert driver.finish["none"] == FinishReason("length", length=0) and driver.tokens["none"] == []


def test_output_ends_where_the_pool_ends() -> None:
    driver = Driver(num_pages=5)
    prompt = [11, 12, 13]
    driver.submit("a", prompt, None)
    driver.submit("b", prompt, 500, seed=4)
    driver.run()
    assert driver.finish["a"] == driver.finish["b"] == FinishReason("length", length=14)
    assert driver.tokens["a"] == driver.expected(prompt, 14) and driver.tokens["b"] == driver.expected(prompt, 14, 4)


@pytest.mark.parametrize(
    ("prompt", "values", "text"),
    [
        ([], {}, "prompt is empty"),
        ([5, 1000], {}, r"1000 is not in \[0, 1000\)"),
        ([-1], {}, r"-1 is not in"),
        ([9] * 100, {}, "no room in the context of 100"),
        ([9] * 90, {}, "exceeds the KV cache of 76"),
        ([9], {"temperature": -1.0}, "temperature"),
        ([9], {"logit_bias": {"x": 1.0}}, "logit_bias"),
    ],
)
def test_bad_requests_are_refused_alone(prompt: list[int], values: dict[str, Any], text: str) -> None:
    driver = Driver(num_pages=20, context_length=100)
    driver.submit("good", [11, 12], 3)
    driver.submit("bad", prompt, 1, **values)
    driver.run()
    reason = driver.finish["bad"]
    assert reason.type == "abort" and reason.status_code == 400
    assert reason.message is not None
    assert re.search(text, reason.message)
    assert driver.tokens["good"] == driver.expected([11, 12], 3)


def test_a_full_queue_answers_503() -> None:
    driver = Driver(max_queued_requests=2)
    for index in range(4):
        driver.submit(str(index), [11, 12, 13 + index], 2)
    driver.run()
    assert [driver.finish[str(index)].status_code for index in range(4)] == [None, None, 503, 503]
    assert "queue is full" in str(driver.finish["3"].message)


def test_a_request_that_would_wait_too_long_is_refused_before_it_waits() -> None:
    driver = Driver(num_pages=400, max_queue_seconds=2.0, chunked_prefill_size=16)
    meter = driver.scheduler.meter
    driver.submit("unknown", list(range(11, 111)), 2)  # nothing was measured: nothing is refused
    driver.run()
    meter.prefill_tokens, meter.prefill_seconds = 1000, 10.0  # 100 tokens a second
    for index in range(4):
        driver.submit(str(index), [12 + index, *range(11, 110)], 2)
    driver.run()
    assert [driver.finish[name].status_code for name in ("unknown", "0", "1", "2", "3")] == [
        None,
        None,
        None,
        None,
        503,
    ]
    assert "take 3.0 s" in str(driver.finish["3"].message) and driver.finish["3"].retry_after == 1
    assert driver.finish["2"].retry_after is None


def test_a_call_of_several_requests_is_not_refused_for_its_own_kin() -> None:
    driver = Driver(num_pages=400, max_queue_seconds=2.0, chunked_prefill_size=16)
    meter = driver.scheduler.meter
    meter.prefill_tokens, meter.prefill_seconds = 1000, 10.0  # 100 tokens a second
    for index in range(6):
        driver.submit(f"a-{index}", [12 + index, *range(11, 110)], 2, call="a-0")
    driver.submit("b-0", list(range(11, 111)), 2, call="b-0")
    driver.submit("b-1", list(range(11, 111)), 2, call="b-0")
    driver.run()
    assert [driver.finish[f"a-{index}"].status_code for index in range(6)] == [None] * 6
    assert [driver.finish[name].status_code for name in ("b-0", "b-1")] == [503, 503]


def test_prompts_that_wait_count_by_what_the_cache_has_had_of_others() -> None:
    driver = Driver(num_pages=400, max_queue_seconds=2.0, chunked_prefill_size=16)
    meter, planner = driver.scheduler.meter, driver.scheduler.planner
    meter.prefill_tokens, meter.prefill_seconds = 1000, 10.0
    planner.prompt_tokens, planner.cached_tokens = 1000, 750
    for index in range(10):
        driver.submit(str(index), [12 + index, *range(11, 110)], 2)  # 1 s each, 0.25 s as cached as the others
    driver.run()
    assert [driver.finish[str(index)].status_code for index in range(10)] == [None] * 9 + [503]


def test_unseeded_requests_draw_from_the_configured_stream() -> None:
    def answers(random_seed: int) -> list[list[int]]:
        driver = Driver(random_seed=random_seed)
        for name in ("a", "b"):
            driver.submit(name, [11, 12], 6, seed=None)
        driver.run()
        return [driver.tokens["a"], driver.tokens["b"]]

    one = answers(1)
    assert one == answers(1) != answers(2)
    assert one[0] != one[1]


def test_an_id_used_twice_ends_both() -> None:
    driver = Driver()
    driver.submit("a", [11, 12], 50)
    driver.step(3)
    driver.submit("a", [11, 12], 50)
    driver.run()
    assert driver.finish["a"].status_code == 400 and "in use" in str(driver.finish["a"].message)


# messages


def test_one_message_a_step_and_news_on_first_and_last_chunk() -> None:
    driver = Driver(overlap=False)
    for index in range(3):
        driver.submit(str(index), [11, 12, 13 + index], 3)
    driver.step()
    news = [message for message in driver.sent if isinstance(message, Tokens)]
    assert len(news) == 1 and len(news[0].chunks) == 3
    driver.clock.now += 5
    driver.run()
    first, middle, last = driver.chunks["0"]
    assert first.queue_seconds == last.queue_seconds == pytest.approx(0.01) and middle.queue_seconds == 0
    assert last.finish is not None and first.finish is None


def test_a_token_alone_needs_no_chunk_and_known_rows_no_names() -> None:
    driver = Driver(overlap=False)
    for name in ("a", "b", "c"):
        driver.submit(name, [11, 12, ord(name)], 6, return_logprob=name == "c", ignore_eos=True)
    driver.step(3)
    news = [message for message in driver.sent if isinstance(message, Tokens)]
    assert [len(message.chunks) for message in news] == [3, 1, 1]  # all begin; then the one with logprobs
    assert [message.rows for message in news] == [None, ["a", "b"], ["a", "b"]]  # told again behind a chunk
    driver.abort("c")
    driver.step(3)
    more = [message for message in driver.sent if isinstance(message, Tokens)][3:]
    assert [(message.rows, len(message.plain), len(message.chunks)) for message in more] == [
        (["a", "b"], 2, 0),
        (None, 2, 0),
        ([], 0, 2),
    ]
    assert all(driver.tokens[name] == oracle([11, 12, ord(name)], 0, 6, driver.runner.vocab_size) for name in "ab")


def test_stream_interval_groups_tokens() -> None:
    driver = Driver(stream_interval=4)
    driver.submit("a", [11, 12], 11)
    driver.run()
    assert [len(chunk.tokens) for chunk in driver.chunks["a"]] == [1, 4, 4, 2]
    assert driver.tokens["a"] == driver.expected([11, 12], 11)


def test_stats_come_while_busy_and_once_when_idle() -> None:
    driver = Driver()
    driver.submit("a", [11, 12, 13, 14, 15], 150)
    driver.run()
    driver.step(300)
    assert 2 <= len(driver.stats) <= 3
    busy, idle = driver.stats[0], driver.stats[-1]
    assert busy.running == 1 and busy.gen_throughput == pytest.approx(100, rel=0.1) and busy.used_tokens > 0
    assert idle.running == 0 and idle.used_tokens == 0 and idle.available_tokens == idle.total_tokens == 199 * 4
    assert idle.step == driver.runner.steps


def test_the_share_of_time_outside_the_forward_pass() -> None:
    planner = Driver().scheduler.planner.state()
    meter = Meter(0.0)
    for begin in (0.0, 1.0):
        meter.step_done(StepOutput(1, np.ones(1, np.int32), np.zeros(1, np.int32), forward_seconds=0.6))
        meter.turn(begin, begin + 0.7, worked=True)
    assert not meter.due(0.5, busy=True) and meter.due(1.7, busy=True)
    # 1.7 s busy (the wait for messages between two working turns counts), 1.2 s of it in the model.
    assert meter.stats(1.7, True, 34, {}, planner).outside_forward == pytest.approx(0.5 / 1.7)
    assert meter.last_throughput == pytest.approx(20)
    meter.turn(1.7, 1.8, worked=False)
    assert meter.due(1.8, busy=False)
    meter.stats(1.8, False, 34, {}, planner)
    assert not meter.due(5.0, busy=False)


# logprobs


@both
def test_logprobs_reach_their_positions(overlap: bool) -> None:
    driver = Driver(overlap=overlap, chunked_prefill_size=8, stream_interval=3)
    prompt = random_tokens(random.Random(5), 21)
    values: dict[str, Any] = {"return_logprob": True, "top_logprobs": 2, "token_ids_logprob": [5]}
    driver.submit("warm", prompt, 1)
    driver.run()
    driver.submit("out", prompt, 7, **values)
    driver.submit("in", prompt, 7, logprob_start=0, **values)
    driver.submit("part", prompt, 0, logprob_start=16, **values)
    driver.run()
    answer = driver.expected(prompt, 7)
    for name in ("out", "in"):
        whole = driver.joined(name)
        assert whole.values == [logprob(token, 21 + index) for index, token in enumerate(answer)]
        assert [len(top) for top in whole.top] == [2] * 7 and whole.chosen[0] == [(logprob(5, 21), 5)]
    assert driver.chunks["out"][0].prompt_logprobs is None
    for name, start in (("in", 1), ("part", 16)):
        given = [chunk.prompt_logprobs for chunk in driver.chunks[name]]
        assert given[0] is not None and given[1:] == [None] * (len(given) - 1)
        assert given[0].values == [logprob(prompt[at], at) for at in range(start, 21)]
        assert len(given[0].top) == len(given[0].chosen) == 21 - start
    assert driver.chunks["in"][0].cached_tokens == 0 and driver.chunks["part"][0].cached_tokens == 12


@both
def test_logprobs_survive_preemption(overlap: bool) -> None:
    driver = Driver(num_pages=16, overlap=overlap, chunked_prefill_size=8)
    driver.scheduler.planner.headroom.share = driver.scheduler.planner.headroom.low = 0.0
    rng = random.Random(6)
    prompts = {str(index): random_tokens(rng, 18) for index in range(4)}
    for name, prompt in prompts.items():
        driver.submit(name, prompt, 20, return_logprob=True, logprob_start=0)
    driver.run()
    assert driver.scheduler.planner.preemptions > 0
    for name, prompt in prompts.items():
        answer = driver.expected(prompt, 20)
        given = driver.chunks[name][0].prompt_logprobs
        assert given is not None and given.values == [logprob(prompt[at], at) for at in range(1, 18)]
        assert driver.joined(name).values == [logprob(token, 18 + index) for index, token in enumerate(answer)]


def test_no_logprobs_unless_asked() -> None:
    driver = Driver()
    driver.submit("a", [11, 12], 2, logprob_start=0)
    driver.run()
    assert all(chunk.logprobs is None and chunk.prompt_logprobs is None for chunk in driver.chunks["a"])


# aborts


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(4))
def test_aborts_at_random_moments_harm_nobody(overlap: bool, seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(num_pages=40, overlap=overlap, chunked_prefill_size=16)
    want = storm(driver, 40, rng)
    doomed = rng.sample(sorted(want), 20)
    for name in doomed:
        driver.step(rng.randrange(4))
        driver.abort(name)
        driver.abort(name)
    driver.run()
    for name, answer in want.items():
        if name in driver.finish:
            assert driver.tokens[name] == answer
        else:
            assert name in doomed and driver.tokens.get(name, []) == answer[: len(driver.tokens.get(name, []))]


def test_an_unknown_abort_is_ignored_and_all_ends_everyone() -> None:
    driver = Driver(max_slots=2)
    driver.abort("nobody")
    for name in "abc":
        driver.submit(name, [11, 12, ord(name)], 50)
    driver.step(3)
    driver.scheduler.receive(Abort(all=True))
    driver.run()
    assert {reason.type for reason in driver.finish.values()} == {"abort"} and len(driver.finish) == 3


# fairness


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "priority"])
def test_nobody_starves_under_a_flood(policy: str) -> None:
    driver = Driver(max_slots=2, num_pages=400, schedule_policy=policy, debug_invariants=False)
    hot = random_tokens(random.Random(1), 16)
    driver.submit("warm", hot, 1)
    driver.run()
    driver.submit("cold", [50, 51, 52], 2, priority=-1)
    for index in range(20):
        driver.submit(f"h{index}", [*hot, 60], 2, priority=1)
    for index in range(20, 3000):
        if "cold" in driver.finish:
            break
        driver.submit(f"h{index}", [*hot, 60], 2, priority=1)
        driver.step(2)
    assert "cold" in driver.finish, "a flood of better placed requests starved this one"


# anything at all


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pages=st.integers(14, 60),
    page_size=st.sampled_from([1, 2, 3, 8]),
    slots=st.integers(1, 9),
    budget=st.integers(1, 40),
    overlap=st.booleans(),
    cache=st.booleans(),
    policy=st.sampled_from(["fcfs", "lpm", "priority"]),
)
def test_any_configuration_gives_right_answers(
    seed: int, pages: int, page_size: int, slots: int, budget: int, overlap: bool, cache: bool, policy: str
) -> None:
    driver = Driver(
        pages * 4 // page_size + 2,
        page_size,
        slots,
        overlap=overlap,
        cache=cache,
        chunked_prefill_size=budget,
        schedule_policy=policy,
    )
    want = storm(driver, 12, random.Random(seed), longest=28, most_new=20)
    driver.run()
    assert driver.tokens == want
    assert driver.runner.max_tokens <= max(budget, slots)


@both
def test_the_quick_way_of_a_token_says_what_the_long_way_says(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(quick: bool) -> tuple[Any, ...]:
        driver = Driver(num_pages=40, overlap=overlap, chunked_prefill_size=16)
        taken = [0]
        only_token = driver.scheduler.results._only_token

        def count(*args: Any) -> bool:
            found = quick and only_token(*args)
            taken[0] += found
            return found

        monkeypatch.setattr(driver.scheduler.results, "_only_token", count)
        storm(driver, 30, random.Random(4))
        driver.submit("scored", [11, 12, 13], 20, return_logprob=True)
        driver.run()
        assert (taken[0] > 100) is quick
        return driver.tokens, driver.finish, driver.scheduler.results.output_tokens, driver.runner.steps

    assert told(True) == told(False)
