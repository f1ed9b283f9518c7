"""A step for which there is no memory: it never happened, the next ones are smaller, and every answer is the same."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import pytest

from phloem.client.continuation import _raise_refusal
from phloem.core.batch import Batch
from phloem.core.errors import OutOfMemory
from phloem.core.late import Prepared
from phloem.core.memory import Paged, groups_of
from phloem.core.request import FinishReason
from phloem.kvcache import audit, undo
from phloem.kvcache.manager import CacheManager, Lease
from phloem.scheduler.recovery import Throttle
from phloem.server.errors import error_body
from phloem.testing.driver import Driver, random_tokens, storm

both = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


def starving(steps: set[int]) -> Any:
    return lambda batch: batch.step in steps


@both
@pytest.mark.parametrize("step", range(1, 14))
def test_one_starved_step_changes_no_token(overlap: bool, step: int, caplog: pytest.LogCaptureFixture) -> None:
    """Prefill in chunks, then decode: whichever step fails."""
    driver = Driver(overlap=overlap, chunked_prefill_size=16, starve=starving({step}))
    rng = random.Random(step)
    prompts = {str(index): random_tokens(rng, 9 + 7 * index) for index in range(4)}
    for name, prompt in prompts.items():
        driver.submit(name, prompt, 10)
    with caplog.at_level(logging.WARNING):
        driver.run()
    assert driver.runner.starved == 1 and driver.scheduler.meter.out_of_memory == 1
    for name, prompt in prompts.items():
        assert driver.tokens[name] == driver.expected(prompt, 10)
        assert driver.finish[name].type == "length"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and told[0].startswith(f"out of memory in step {step} (") and "at most" in told[0]
    assert driver.stats[-1].out_of_memory == 1
    state = driver.control("state")
    assert state is not None and state.data["out_of_memory"] == 1


@pytest.mark.some(16)
@pytest.mark.slow
@both
@pytest.mark.parametrize("cache", [True, False], ids=["tree", "no-tree"])
@pytest.mark.parametrize("seed", range(12))
def test_storm_with_starved_steps(overlap: bool, cache: bool, seed: int) -> None:
    """Colliding prefixes, few pages, preemptions, random ends, any step starved: the oracle's tokens throughout."""
    rng = random.Random(seed)
    driver = Driver(
        num_pages=rng.choice([24, 40, 200]),
        overlap=overlap,
        cache=cache,
        chunked_prefill_size=rng.choice([8, 16, 64]),
        starve=lambda batch: batch.num_tokens > 1 and rng.random() < 0.15,
    )
    driver.scheduler.planner.headroom.share = 0.0
    want = storm(driver, 40, rng, longest=30)
    driver.run()
    assert driver.runner.starved > 5
    assert driver.tokens == want
    assert all(reason.type != "abort" for reason in driver.finish.values())


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_of_calls_and_starved_steps(overlap: bool, seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(num_pages=30, overlap=overlap, chunked_prefill_size=16, starve=lambda batch: batch.step % 7 == 3)
    want = storm(driver, 40, rng)
    for turn in range(300):
        act = rng.randrange(12)
        if act == 0:
            driver.control("pause", mode=rng.choice(["retract", "in_place"]))
        elif act == 1:
            driver.scheduler.retract_all()
        elif act == 2:
            driver.abort(f"q{rng.randrange(40)}")
        elif act == 3 and turn % 20 == 0:
            driver.runner.fail_steps.add(driver.runner.steps + rng.randrange(1, 4))
        else:
            driver.control("resume")
            driver.step(2)
    driver.control("resume")
    driver.run()
    for name, answer in want.items():
        got = driver.tokens.get(name, [])
        ended = name in driver.finish and driver.finish[name].type != "abort"
        assert got == (answer if ended else answer[: len(got)])
    assert sum(reason.type != "abort" for reason in driver.finish.values()) >= 5


@pytest.mark.slow
@both
@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_steps_shrink_until_they_fit(overlap: bool, most: int) -> None:
    """Never more than `most` tokens fit: slow, but every answer is whole."""
    driver = Driver(overlap=overlap, starve=lambda batch: batch.num_tokens > most)
    rng = random.Random(most)
    prompts = {str(index): random_tokens(rng, 33 + index) for index in range(5)}
    for name, prompt in prompts.items():
        driver.submit(name, prompt, 6)
    driver.run(2000)
    for name, prompt in prompts.items():
        assert driver.tokens[name] == driver.expected(prompt, 6)


@both
def test_a_request_that_fits_nowhere_ends_alone(overlap: bool, caplog: pytest.LogCaptureFixture) -> None:
    slots: dict[str, int] = {}

    def starve(batch: Batch) -> bool:
        slots.update({admission.request_id: admission.slot for admission in batch.admissions})
        return slots.get("big", -1) in batch.slots.tolist() and "big" in driver.scheduler.live

    driver = Driver(overlap=overlap, starve=starve)
    driver.submit("a", [11, 12, 13], 30)
    driver.submit("big", random_tokens(random.Random(1), 40), 30)
    driver.submit("b", [11, 12, 14], 30)
    with caplog.at_level(logging.ERROR):
        driver.run()
    finish = driver.finish["big"]
    assert finish.type == "abort" and finish.status_code == 507
    assert "not even a step of this request alone" in str(finish.message) and "injected" in str(finish.message)
    assert driver.tokens["a"] == driver.expected([11, 12, 13], 30)
    assert driver.tokens["b"] == driver.expected([11, 12, 14], 30)
    assert any("no smaller step is possible" in record.getMessage() for record in caplog.records)


@both
def test_logprobs_and_hidden_states_come_once(overlap: bool) -> None:
    def answers(steps: set[int]) -> tuple[Any, ...]:
        driver = Driver(overlap=overlap, chunked_prefill_size=16, starve=starving(steps))
        prompt = random_tokens(random.Random(3), 45)
        driver.submit("a", prompt, 8, return_logprob=True, logprob_start=0, top_logprobs=2, return_hidden=True)
        driver.submit("s", prompt[:30], 0, return_logprob=True, logprob_start=5)
        driver.run()
        prompts = [chunk.prompt_logprobs.values for chunk in driver.chunks["a"] if chunk.prompt_logprobs is not None]
        scored = [chunk.prompt_logprobs.values for chunk in driver.chunks["s"] if chunk.prompt_logprobs is not None]
        hidden = [state for chunk in driver.chunks["a"] for state in chunk.hidden]
        whole = driver.joined("a")
        return driver.tokens["a"], whole.values, whole.top, prompts, scored, hidden, driver.finish["s"].type

    want = answers(set())
    for step in range(1, 14):
        assert answers({step}) == want, step
    assert answers({2, 3, 5, 6, 8, 11}) == want


@both
@pytest.mark.parametrize("step", range(1, 9))
def test_masks_follow_every_token_once(overlap: bool, step: int) -> None:
    """A mask that allows one token: the successor of the last. The starved step's token must not be counted."""

    class Chain:
        can_jump = False

        def __init__(self) -> None:
            self.known: list[int] = []

        def follower(self, output: Any) -> Any:
            self.known = list(output)
            return self

        def masks(self, sampled: list[int], drafts: list[int]) -> Any:
            self.known += sampled
            words = np.zeros(32, np.int32)
            token = 100 + len(self.known)
            words[token // 32] = np.uint32(1 << token % 32).view(np.int32)
            return [words]

    driver = Driver(overlap=overlap, prepare=lambda submit, prompt: Prepared((), Chain()), starve=starving({step}))
    driver.submit("a", [11, 12, 13], 8)
    driver.submit("b", [11, 12, 13, 14, 15], 8)
    driver.run()
    assert driver.tokens["a"] == driver.tokens["b"] == list(range(100, 108))


def test_only_the_oldest_rows_run_while_memory_is_short_and_all_again_later() -> None:
    rows: list[list[int]] = []

    def starve(batch: Batch) -> bool:
        rows.append(batch.slots.tolist())
        return batch.step == 5

    driver = Driver(overlap=False, starve=starve)
    prompts = {str(index): random_tokens(random.Random(index), 5) for index in range(8)}
    for name, prompt in prompts.items():
        driver.submit(name, prompt, 40)
    driver.step(5)
    assert driver.scheduler.planner.throttle.budget == 4
    held = driver.cache.held_pages
    driver.step()
    assert sorted(rows[-1]) == [driver.scheduler.live[str(index)].slot for index in range(4)]
    assert driver.cache.held_pages >= held and driver.scheduler.planner.preemptions == 0
    driver.run()
    assert max(map(len, rows[5:])) == 8
    for name, prompt in prompts.items():
        assert driver.tokens[name] == driver.expected(prompt, 40)


def test_the_budget_halves_and_returns() -> None:
    throttle = Throttle.of(8192)
    throttle.passed()
    assert not throttle.active
    throttle.failed(6000)
    assert throttle.budget == 3000
    sizes = []
    while throttle.active:
        throttle.passed()
        sizes.append(throttle.budget)
    assert sizes == sorted(sizes) and sizes[-1] == 8192
    near = sum(4500 <= size <= 7500 for size in sizes)
    assert near > 100 > len(sizes) - near  # where it failed it creeps
    throttle.failed(1)
    assert throttle.budget == 1


def test_pages_go_back_to_their_writer_and_a_reader_of_them_loses_its_own() -> None:
    cache = CacheManager(groups_of((Paged(1, 1, 1),)), (20,), 4)
    tokens = np.arange(40, dtype=np.int32)
    writer = cache.match("", tokens, 39, (np.zeros(10, np.int32),))
    cache.reserve(writer, 10)
    cache.commit(writer, tokens, 6)  # page 0 is computed, half of page 1
    mark, first = cache.mark(), writer.tables[0][:5].copy()
    cache.reserve(writer, 18)
    given = [cache.given(writer)]
    cache.commit(writer, tokens, 18)
    reader = cache.match("", tokens, 30, (np.zeros(10, np.int32),))
    assert reader.shared == 4
    cache.reserve(reader, 24)
    audit.check(cache, [writer, reader])
    undo.roll_back(cache, mark, [(writer, 9), (reader, 9)], given)
    audit.check(cache, [writer, reader])
    assert (writer.shared, writer.held) == (1, 5) and (writer.tables[0][:3] == first[:3]).all()
    assert (reader.shared, reader.held) == (1, 1) and reader.tables[0][0] == first[0]
    assert cache.probe("", tokens, 40).num_pages == 1


def test_what_a_finished_request_left_behind_the_mark_is_forgotten() -> None:
    cache = CacheManager(groups_of((Paged(1, 1, 1),)), (20,), 4)
    tokens = np.arange(16, dtype=np.int32)
    mark = cache.mark()
    lease: Lease = cache.match("", tokens, 15, (np.zeros(10, np.int32),))
    cache.reserve(lease, 16)
    cache.release(lease, tokens, 16)
    assert cache.tree.pages == 4
    undo.roll_back(cache, mark, [], [])
    assert cache.tree.pages == 0 and cache.free_pages == cache.total_pages
    audit.check(cache, [])


def test_the_door_answers_507() -> None:
    reason = FinishReason("abort", message="out of memory: not even one token fits", status_code=507)
    with pytest.raises(OutOfMemory, match="not even one token") as raised:
        _raise_refusal(reason, {})
    assert raised.value.status == 507 and b"out_of_memory" in error_body(raised.value)
