"""Failures, late requests and administrative calls: what goes wrong for one request harms no other."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phloem.core.errors import BadRequest, EngineDead, QueueFull
from phloem.core.late import Prepared
from phloem.core.messages import Drain
from phloem.core.request import FinishReason, RequestStatus
from phloem.testing.driver import Driver, random_tokens, storm

both = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])

# failures


@both
def test_a_row_that_fails_fails_alone(overlap: bool, caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(overlap=overlap, fail_row=lambda name, at: "broken row" if (name, at) == ("q3", 30) else None)
    prompts = {f"q{index}": random_tokens(random.Random(index), 20) for index in range(6)}
    for name, prompt in prompts.items():
        driver.submit(name, prompt, 20)
    with caplog.at_level(logging.ERROR):
        driver.run()
    assert driver.finish["q3"] == FinishReason("abort", message="broken row", status_code=500)
    assert any("q3" in record.getMessage() for record in caplog.records)
    for name, prompt in prompts.items():
        expected = driver.expected(prompt, 20)
        assert driver.tokens[name] == (expected[: len(driver.tokens[name])] if name == "q3" else expected)


@both
def test_a_step_that_fails_ends_its_requests_and_no_others(overlap: bool) -> None:
    driver = Driver(overlap=overlap, max_slots=3, chunked_prefill_size=16)
    driver.runner.fail_steps = {6}
    rng = random.Random(1)
    prompts = {str(index): random_tokens(rng, 10) for index in range(8)}
    for name, prompt in prompts.items():
        driver.submit(name, prompt, 12)
    driver.run()
    failed = [name for name, reason in driver.finish.items() if reason.type == "abort"]
    assert 1 <= len(failed) <= 3
    assert {driver.finish[name].status_code for name in failed} == {500}
    assert "injected: step 6" in str(driver.finish[failed[0]].message)
    for name in prompts.keys() - set(failed):
        assert driver.tokens[name] == driver.expected(prompts[name], 12)


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(4))
def test_storm_with_failing_steps_and_rows(overlap: bool, seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(
        num_pages=24,
        overlap=overlap,
        chunked_prefill_size=16,
        fail_row=lambda name, at: "row" if (int(name[1:]) * 7 + at) % 61 == 0 else None,
    )
    driver.scheduler.planner.headroom.share = 0.0
    driver.runner.fail_steps = {rng.randrange(200) for _ in range(4)}
    driver.runner.fail_launches = {rng.randrange(200) for _ in range(3)}
    want = storm(driver, 40, rng, longest=30)
    driver.run()
    assert driver.finish.keys() == want.keys()
    for name, answer in want.items():
        got = driver.tokens[name]
        assert got == (answer[: len(got)] if driver.finish[name].type == "abort" else answer)
    assert sum(reason.type != "abort" for reason in driver.finish.values()) >= 10


def test_a_launch_that_raises_ends_its_requests() -> None:
    driver = Driver()
    driver.runner.fail_launches = {2}
    driver.submit("a", [11, 12], 5)
    driver.run()
    assert driver.finish["a"].status_code == 500
    driver.submit("b", [11, 12], 5)
    driver.run()
    assert driver.tokens["b"] == driver.expected([11, 12], 5)


@both
@pytest.mark.parametrize("call", ["launch", "result"])
def test_a_runner_that_has_gone_ends_the_engine_and_answers_nobody(
    overlap: bool, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are answered by who sees the engine go: 503, to be tried again."""
    driver = Driver(overlap=overlap)
    for name in "ab":
        driver.submit(name, [11, 12], 8)
    if call == "launch":
        driver.step()

    def gone(*_: object) -> None:
        raise EngineDead("rank 1 of 2 has gone")

    if call == "launch":
        monkeypatch.setattr(driver.runner, "launch", gone)
    else:
        launch = driver.runner.launch
        monkeypatch.setattr(driver.runner, "launch", lambda batch: SimpleNamespace(result=gone, inner=launch(batch)))
    with pytest.raises(EngineDead, match="rank 1 of 2"):
        driver.run()
    assert not driver.finish


def test_a_result_that_cannot_be_taken_fails_alone() -> None:
    driver = Driver(overlap=False)
    driver.submit("a", [11, 12], 5, return_logprob=True)
    driver.submit("b", [11, 13], 5)
    driver.step()
    driver.scheduler.live["a"].fresh_logprobs = None  # type: ignore[assignment]
    driver.run()
    assert driver.finish["a"].status_code == 500
    assert driver.tokens["b"] == driver.expected([11, 13], 5)


# late requests


class Late:
    def __init__(self, turns: int = 3, error: Exception | None = None, broken: bool = False) -> None:
        self.turns, self.error, self.broken = turns, error, broken

    def ready(self) -> bool:
        if self.broken:
            raise OSError("store is gone")
        self.turns -= 1
        return self.turns < 0


class Masked:
    """Allows tokens 34 and 35, or fails at the third token; counts admissions and what it is told."""

    can_jump = False

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.seen: list[int] = []
        self.admitted: list[list[int]] = []

    def follower(self, output: Sequence[int]) -> Masked:
        self.admitted.append(list(output))
        return self

    def masks(self, sampled: Sequence[int], drafts: Sequence[int]) -> list[np.ndarray | None]:
        assert not drafts
        self.seen.extend(sampled)
        if self.fails and len(self.seen) == 2:
            raise ValueError("grammar is stuck")
        words = np.zeros(32, dtype=np.int32)
        words[1] = 0b1100
        return [words]


def test_late_requests_wait_without_holding_anything() -> None:
    late = {"slow": Late(), "bad": Late(error=BadRequest("no such grammar")), "broken": Late(broken=True)}
    late["full"] = Late(turns=0, error=QueueFull("too many grammars"))
    driver = Driver(prepare=lambda submit, prompt: Prepared((late[submit.id],)) if submit.id in late else None)
    for name in ("slow", "bad", "broken", "full", "plain", "gone"):
        late["gone"] = Late(turns=10**9)
        driver.submit(name, [11, 12, 13], 3)
    assert driver.scheduler.live["slow"].status is RequestStatus.WAITING_ON
    driver.step(2)
    assert driver.scheduler.num_waiting == 3 and driver.cache.held_pages <= 2
    driver.abort("gone")
    driver.run()
    assert driver.finish["bad"] == FinishReason("abort", message="no such grammar", status_code=400)
    assert driver.finish["full"].status_code == 503
    assert driver.finish["broken"].status_code == 400 and "store is gone" in str(driver.finish["broken"].message)
    assert driver.tokens["slow"] == driver.tokens["plain"] == driver.expected([11, 12, 13], 3)
    assert "gone" not in driver.finish


def test_a_prepare_that_raises_refuses_the_request() -> None:
    def prepare(submit: Any, prompt: np.ndarray) -> None:
        raise BadRequest("bad schema") if submit.id == "a" else RuntimeError("bug")

    driver = Driver(prepare=prepare)
    driver.submit("a", [11], 3)
    driver.submit("b", [11], 3)
    driver.run()
    assert driver.finish["a"] == FinishReason("abort", message="bad schema", status_code=400)
    assert driver.finish["b"].status_code == 500


@both
def test_masks_reach_the_runner_and_their_failures_are_alone(overlap: bool) -> None:
    made = {"a": Masked(False), "b": Masked(True)}
    driver = Driver(overlap=overlap, prepare=lambda submit, prompt: Prepared((), made.get(submit.id)))
    for name in "abc":
        driver.submit(name, [11, 12], 6)
    driver.run()
    assert set(driver.tokens["a"]) <= {34, 35} and made["a"].seen == driver.tokens["a"][:5]
    assert driver.finish["b"].status_code == 500 and "grammar is stuck" in str(driver.finish["b"].message)
    assert driver.tokens["c"] == driver.expected([11, 12], 6)


def test_a_constraint_is_told_of_every_admission() -> None:
    made = Masked()
    driver = Driver(prepare=lambda submit, prompt: Prepared((Late(turns=0),), made))
    driver.submit("a", [11, 12, 13], 12)
    driver.step(6)
    driver.scheduler.retract_all()
    driver.run()
    assert len(made.admitted) == 2 and made.admitted[0] == []
    assert made.admitted[1] == driver.tokens["a"][: len(made.admitted[1])] and len(made.admitted[1]) >= 4


# control


def test_flush_waits_for_quiet_until_its_deadline() -> None:
    driver = Driver()
    driver.submit("a", random_tokens(random.Random(1), 20), 30)
    driver.step(3)
    reply = driver.control("flush_cache")
    assert reply is not None and not reply.ok and "1 requests are running" in reply.message
    assert driver.control("flush_cache", timeout=60) is None
    driver.run()
    driver.step()
    assert driver.replies["flush_cache"].ok and driver.cache.free_pages == driver.cache.total_pages
    driver.submit("b", random_tokens(random.Random(1), 20), 200)
    driver.step(3)
    assert driver.control("flush_cache", timeout=0.1) is None
    driver.step(15)
    assert not driver.replies["flush_cache"].ok


@both
def test_pause_in_place_keeps_pages_and_goes_on(overlap: bool) -> None:
    driver = Driver(overlap=overlap)
    driver.submit("a", [11, 12], 20)
    driver.step(5)
    assert driver.control("pause", mode="in_place") is not None
    driver.step(5)
    count = len(driver.tokens["a"])
    driver.step(5)
    assert len(driver.tokens["a"]) == count < 20 and driver.cache.held_pages > 0
    assert not driver.scheduler.inflight and not driver.scheduler.busy
    driver.control("resume")
    driver.run()
    assert driver.tokens["a"] == driver.expected([11, 12], 20)


@both
def test_pause_retract_frees_pages_for_a_flush(overlap: bool) -> None:
    driver = Driver(overlap=overlap)
    driver.submit("a", [11, 12], 20)
    driver.step(5)
    driver.control("pause", mode="retract")
    driver.step(2)
    reply = driver.control("flush_cache")
    assert reply is not None and reply.ok
    driver.control("resume")
    driver.run()
    assert driver.tokens["a"] == driver.expected([11, 12], 20)


def test_pause_abort_tells_everyone_and_gives_what_was_made() -> None:
    driver = Driver(stream_interval=100)
    driver.submit("a", [11, 12], 50)
    driver.step(8)
    reply = driver.control("pause", mode="abort")
    assert reply is not None and reply.ok
    assert driver.finish["a"].type == "abort" and driver.finish["a"].status_code is None
    made = driver.tokens["a"]
    assert len(made) >= 5 and made == driver.expected([11, 12], len(made))
    assert driver.scheduler.paused


def test_control_calls_answer_even_when_wrong() -> None:
    driver = Driver()
    unknown = driver.control("fly")
    assert unknown is not None and not unknown.ok and "flush_cache" in unknown.message
    mode = driver.control("pause", mode="sometimes")
    assert mode is not None and not mode.ok and "retract" in mode.message and not driver.scheduler.paused
    broken = driver.control("flush_cache", timeout="soon")
    assert broken is not None and not broken.ok


def test_state_and_cache_tree() -> None:
    driver = Driver()
    driver.submit("a", random_tokens(random.Random(1), 20), 30)
    driver.step(3)
    state = driver.control("state")
    assert state is not None and state.data["running"] == 1 and state.data["waiting"] == 0
    assert state.data["used_tokens"] == 24 and state.data["schedule_policy"] == "fcfs"
    tree = driver.control("cache_tree")
    assert tree is not None and tree.data["nodes"][0]["tokens"] == 20 and tree.data["nodes"][0]["locks"] == 1
    aborted = driver.control("abort_all")
    assert aborted is not None and aborted.data == {"aborted": 1} and "a" in driver.finish


def test_drain_finishes_what_it_has_and_refuses_what_comes() -> None:
    driver = Driver()
    driver.submit("a", [11, 12], 20)
    driver.step(2)
    driver.scheduler.receive(Drain(timeout=60))
    driver.submit("late", [11, 12], 20)
    driver.run()
    driver.step()
    assert driver.scheduler.stopped
    assert driver.tokens["a"] == driver.expected([11, 12], 20) and driver.finish["late"].status_code == 503


def test_drain_gives_up_at_its_deadline() -> None:
    driver = Driver()
    driver.submit("a", [11, 12], 500)
    driver.control("flush_cache", timeout=1000)
    driver.scheduler.receive(Drain(timeout=0.1))
    driver.step(20)
    assert driver.scheduler.stopped and driver.finish["a"].status_code == 503
    assert "flush_cache" in driver.replies


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(5))
def test_any_mixture_of_calls_keeps_answers_and_pages_right(overlap: bool, seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(num_pages=30, overlap=overlap, chunked_prefill_size=16, schedule_policy=rng.choice(["fcfs", "lpm"]))
    want = storm(driver, 40, rng)
    for turn in range(300):
        act = rng.randrange(12)
        if act == 0:
            driver.control("pause", mode=rng.choice(["retract", "in_place"]))
        elif act == 1:
            driver.scheduler.retract_all()
        elif act == 2:
            driver.abort(f"q{rng.randrange(40)}")
        elif act == 3 and turn % 50 == 0:
            driver.control("flush_cache", timeout=rng.choice([0, 0.3]))
        elif act == 4 and turn % 20 == 0:
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
