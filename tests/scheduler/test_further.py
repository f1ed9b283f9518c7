"""Pages that left the pool come back from tiers, and whatever happens on the way the answers are the oracle's, and all
pages and rows are accounted for."""

from __future__ import annotations

import errno
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tier_support import Slow, Tiered, disk_in

from phloem.core.messages import Control
from phloem.kvcache.tiers import _segments as segments
from phloem.testing.driver import Driver, random_tokens, storm

both = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
PROMPTS = [random_tokens(random.Random(seed), 60) for seed in range(6)]
SMALL = 40  # pages of 4 tokens: two of these requests at once


def driver_of(**values: Any) -> Driver:
    return Driver(SMALL, 4, **values)


def in_store(tiered: Tiered) -> None:
    """All prompts are computed, and none of the first is left in pool or host memory."""
    for at, prompt in enumerate(PROMPTS):
        assert tiered.ask(f"first{at}", prompt) == {"device": 0, "host": 0, "storage": 0}
    tiered.tiers.flush()
    assert tiered.driver.control("flush_cache") is not None


@both
@pytest.mark.parametrize("write", ["write_through", "write_through_selective", "write_back"])
def test_what_the_pool_has_lost_comes_from_the_store(tmp_path: Path, write: str, overlap: bool) -> None:
    tiered = Tiered(driver_of(overlap=overlap), disk_in(tmp_path), 64 if write == "write_back" else 16, write)
    for at, prompt in enumerate(PROMPTS):
        tiered.ask(f"a{at}", prompt)
        if write == "write_through_selective":
            assert tiered.tiers.counts.written in (0, at * 14)
            tiered.ask(f"again{at}", prompt)  # what is found again is written
    if write == "write_back":
        tiered.tiers.flush()
    found = tiered.ask("b", PROMPTS[0])
    assert found == {"device": 0, "host": 0, "storage": 56} and tiered.driver.runner.computed["b"] == 4 + 7
    assert tiered.ask("c", PROMPTS[0])["device"] == 56, "it is in the pool again"
    follow = PROMPTS[0] + tiered.driver.tokens["a0"] + random_tokens(random.Random(9), 10)
    assert sum(tiered.ask("d", follow).values()) >= 56
    stats = tiered.tiers.stats()
    assert stats["load_back_tokens"] == stats["storage_prefetch_hit_tokens"] >= 56
    assert stats["backup_dropped_tokens"] == 0 and stats["storage_failures"] == 0
    tiered.close()


@both
def test_what_the_pool_has_lost_comes_from_host_memory(overlap: bool) -> None:
    tiered = Tiered(driver_of(overlap=overlap), None, 200)
    for at, prompt in enumerate(PROMPTS):
        tiered.ask(f"a{at}", prompt)
    assert tiered.ask("b", PROMPTS[0]) == {"device": 0, "host": 56, "storage": 0}
    assert tiered.driver.control("flush_cache") is not None
    assert tiered.ask("c", PROMPTS[0]) == {"device": 0, "host": 0, "storage": 0}, "flushed with the pool"
    reply = tiered.driver.control("clear_hicache_storage")
    assert reply is not None and not reply.ok and "storage" in reply.message
    tiered.close()


def test_another_process_finds_what_one_has_left_and_another_model_does_not(tmp_path: Path) -> None:
    tiered = Tiered(driver_of(), disk_in(tmp_path))
    tiered.ask("a", PROMPTS[0])
    tiered.close()
    tiered = Tiered(driver_of(), disk_in(tmp_path))
    assert tiered.ask("b", PROMPTS[0], seed=3)["storage"] == 56
    assert tiered.ask("salted", PROMPTS[0], namespace="x")["storage"] == 0
    tiered.close()


@both
@pytest.mark.parametrize("write", ["write_through", "write_through_selective", "write_back"])
@pytest.mark.parametrize("starved", [False, True])
def test_storms_over_a_small_pool_answer_as_the_oracle(
    tmp_path: Path, write: str, overlap: bool, starved: bool
) -> None:
    """Preemptions, evictions, steps that never happened; several rounds, so that what comes back is old and new."""
    rng, left = random.Random(5), [40]

    def starve(batch: Any) -> bool:
        left[0] -= starved
        return starved and left[0] % 7 == 0 and left[0] > 0

    driver = Driver(24, 4, 4, overlap=overlap, starve=starve, chunked_prefill_size=16)
    tiered = Tiered(driver, disk_in(tmp_path), 24, write)
    known: dict[str, list[int]] = {}
    for turn in range(3):
        want = storm(driver, 24, random.Random(5 + turn // 2), longest=60, most_new=12)
        for name in list(want):
            if rng.random() < 0.1:
                driver.abort(name)
                known.pop(name, None)
                del want[name]
        tiered.run()
        assert {name: driver.tokens[name] for name in want} == want
        driver.tokens.clear()
        driver.finish.clear()
    if starved:
        assert driver.runner.starved
    assert tiered.tiers.counts.loaded > 0
    tiered.close()


def test_a_step_that_never_happened_leaves_what_was_restored_right(tmp_path: Path) -> None:
    failing: list[bool] = []

    def starve(batch: Any) -> bool:
        return bool(failing) and failing.pop()

    driver = driver_of(starve=starve, chunked_prefill_size=16)
    tiered = Tiered(driver, disk_in(tmp_path))
    in_store(tiered)
    failing += [True, False]
    assert tiered.ask("b", PROMPTS[1])["storage"] == 56 and driver.runner.starved == 1
    assert tiered.driver.runner.computed["b"] < 60
    tiered.close()


@pytest.mark.parametrize("failed", [0, 1, 2])
@both
def test_what_a_step_that_never_happened_should_have_computed_is_not_written(
    tmp_path: Path, overlap: bool, failed: int
) -> None:
    failing = [step == failed for step in range(4)]

    def starve(batch: Any) -> bool:
        return bool(failing) and failing.pop(0)

    driver = driver_of(overlap=overlap, starve=starve, chunked_prefill_size=16)
    tiered = Tiered(driver, disk_in(tmp_path))
    tiered.ask("a", PROMPTS[0])
    assert driver.runner.starved == 1
    driver.control("flush_cache")
    assert tiered.ask("b", PROMPTS[0])["storage"] == 56
    tiered.close()


def test_a_copy_that_fails_ends_the_step_that_would_have_read_it(tmp_path: Path) -> None:
    tiered = Tiered(driver_of(), disk_in(tmp_path))
    in_store(tiered)
    tiered.copies.broken = True
    tiered.driver.submit("b", PROMPTS[0], 4)
    tiered.run()
    assert tiered.driver.finish["b"].status_code == 500
    tiered.copies.broken = False
    assert tiered.ask("c", PROMPTS[0])["host"] == 56
    tiered.close()


@both
def test_what_a_failed_request_has_computed_is_not_believed(tmp_path: Path, overlap: bool) -> None:
    failing: list[str] = []

    def fail_row(name: str, position: int) -> str | None:
        return "injected: a row" if name in failing and position > 40 else None

    tiered = Tiered(driver_of(overlap=overlap, fail_row=fail_row, chunked_prefill_size=16), disk_in(tmp_path))
    failing.append("a")
    tiered.driver.submit("a", PROMPTS[0], 4)
    tiered.run()
    assert tiered.driver.finish["a"].status_code == 500 and tiered.tiers.counts.written > 0
    assert tiered.ask("b", PROMPTS[0]) == {"device": 0, "host": 0, "storage": 0}
    tiered.close()


# a store that is slow


def waiting_for_the_store(policy: str, **values: Any) -> tuple[Tiered, Slow]:
    store = Slow()
    tiered = Tiered(driver_of(**values), store, policy=policy)
    in_store(tiered)
    tiered.driver.submit("b", PROMPTS[0], 4)
    assert store.asked.wait(10)
    return tiered, store


def test_a_request_waits_for_all_of_it(tmp_path: Path) -> None:
    tiered, store = waiting_for_the_store("wait_complete")
    tiered.driver.step(500)
    assert "b" not in tiered.driver.tokens and tiered.tiers.host.stats()["pinned"] == 14
    store.gate.set()
    tiered.run()
    assert tiered.driver.chunks["b"][-1].cached_storage == 56
    tiered.close()


@pytest.mark.parametrize(("policy", "steps"), [("timeout", 102), ("best_effort", 1)])
def test_a_request_waits_no_longer_than_its_policy_says(policy: str, steps: int) -> None:
    tiered, store = waiting_for_the_store(policy)
    tiered.driver.step(steps - 1)
    assert "b" not in tiered.driver.tokens
    tiered.driver.step(20)
    assert tiered.driver.tokens["b"] == tiered.driver.expected(PROMPTS[0], 4)
    assert tiered.driver.chunks["b"][-1].cached_tokens == 0
    store.gate.set()
    while tiered.tiers.counts.prefetched < 14:
        time.sleep(0.001)
    tiered.run()
    assert tiered.tiers.stats()["storage_prefetch_hit_tokens"] == 0
    tiered.driver.control("flush_cache")
    tiered.close()


@pytest.mark.parametrize("event", ["abort", "flush", "pause", "drain"])
def test_what_happens_while_pages_are_fetched(event: str) -> None:
    tiered, store = waiting_for_the_store("wait_complete")
    driver = tiered.driver
    if event == "abort":
        driver.abort("b")
        driver.step()
        assert not driver.scheduler.live
    elif event == "flush":
        reply = driver.control("flush_cache")
        assert reply is not None and reply.ok
    elif event == "pause":
        driver.scheduler.receive(Control(id="pause", name="pause", args={"mode": "in_place"}))
        driver.step(5)
        driver.scheduler.receive(Control(id="resume", name="resume"))
    else:
        driver.scheduler.abort_all(driver.finish["first0"])
        driver.step()
    store.gate.set()
    tiered.run()
    if event in ("flush", "pause"):
        assert driver.tokens["b"] == driver.expected(PROMPTS[0], 4)
    tiered.close()


@pytest.mark.parametrize("turns", [0, 1])
def test_a_name_that_is_used_again_has_no_pages_of_who_had_it_before(turns: int) -> None:
    """Keys are kept by request: those of a prompt that was aborted are not those of the next one of its name."""
    tiered, store = waiting_for_the_store("wait_complete")
    driver = tiered.driver
    driver.abort("b")
    driver.step(turns)
    driver.submit("b", PROMPTS[1], 8)
    store.gate.set()
    tiered.run()
    assert driver.tokens["b"] == driver.expected(PROMPTS[1], 8)
    assert driver.chunks["b"][-1].cached_tokens == 56
    tiered.close()


def test_several_requests_that_wait_for_the_same_pages_share_them() -> None:
    tiered, store = waiting_for_the_store("wait_complete")
    for name in "cde":
        tiered.driver.submit(name, PROMPTS[0], 4)
    store.gate.set()
    tiered.run()
    for name in "bcde":
        assert tiered.driver.tokens[name] == tiered.driver.expected(PROMPTS[0], 4)
        assert tiered.driver.chunks[name][-1].cached_tokens == 56
    assert tiered.driver.runner.computed_tokens < len(PROMPTS) * 70 + 4 * 12
    tiered.close()


# stores that fail


class Failing(Slow):
    """A store that breaks its promise."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.gate.set()

    def read(self, keys: Any, rows: Any) -> int:
        if self.what == "read":
            raise RuntimeError("injected: a read")
        return super().read(keys, rows) if self.what != "half" else super().read(keys[:5], rows[:5])

    def write(self, keys: Any, rows: Any) -> int:
        if self.what == "write":
            raise RuntimeError("injected: a write")
        return super().write(keys, rows) if self.what != "full" else 0


@pytest.mark.parametrize(("what", "cached"), [("read", 0), ("half", 20), ("write", 0), ("full", 0)])
def test_a_store_that_fails_costs_no_answer(what: str, cached: int) -> None:
    tiered = Tiered(driver_of(), Failing(what))
    in_store(tiered)
    assert sum(tiered.ask("b", PROMPTS[0]).values()) == cached
    assert tiered.ask("c", PROMPTS[0])["device"] == 56
    tiered.close()


def full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segments.os, "pwritev", refuse)


def spoilt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of every row are others."""
    for path in folder.glob("replica-0/*.kv"):
        data = np.fromfile(path, np.uint8)
        data[::512] ^= 4
        path.write_bytes(data.tobytes())


def gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("state", ["exists", "read", "write"])
@pytest.mark.parametrize("fault", [full, spoilt, gone])
def test_a_disk_that_fails_in_any_state_costs_no_answer(
    fault: Callable[[Path, pytest.MonkeyPatch], None], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`state`: what the store is asked for when it happens: what it has, rows that it has, or to take some."""
    store = disk_in(tmp_path)
    tiered, struck = Tiered(driver_of(), store, 16), list[str]()
    in_store(tiered)
    call = getattr(store, state)

    def strike(*given: Any) -> Any:
        if not struck:
            struck.append(state)
            fault(tmp_path, monkeypatch)
        return call(*given)

    monkeypatch.setattr(store, state, strike)
    fresh = [random_tokens(random.Random(seed), 60) for seed in range(20, 26)]
    found = sum(tiered.ask("b", PROMPTS[0]).values())
    for at, prompt in enumerate(fresh):  # these are written
        assert sum(tiered.ask(f"c{at}", prompt).values()) == 0
    assert struck and (found == 56 if fault is full or state == "write" else found < 56)
    for at, prompt in enumerate([*PROMPTS, *fresh]):
        tiered.ask(f"d{at}", prompt)
    tiered.close()


def test_rows_that_are_short_shorten_what_is_written_and_fetched(tmp_path: Path) -> None:
    tiered = Tiered(driver_of(chunked_prefill_size=512), disk_in(tmp_path), rows=5)
    in_store(tiered)
    assert tiered.tiers.stats()["backup_dropped_tokens"] > 0
    assert tiered.ask("b", PROMPTS[0])["storage"] == 20
    tiered.close()


# weights that change


def test_pages_of_other_weights_are_never_found_nor_written(tmp_path: Path) -> None:
    tiered = Tiered(driver_of(), disk_in(tmp_path))
    driver = tiered.driver
    tiered.ask("a", PROMPTS[0])
    driver.submit("long", PROMPTS[1], 40)
    driver.step(12)  # it runs on with the new weights, in pages of both
    driver.scheduler.settle()
    driver.runner.weights, driver.scheduler.weight_version = 1, "1"
    tiered.run()
    written = tiered.tiers.counts.written
    driver.submit("b", PROMPTS[0], 8, seed=-1)
    tiered.run()
    assert driver.chunks["b"][-1].cached_tokens == 0
    assert driver.tokens["b"] == driver.expected(PROMPTS[0], 8, 0)
    assert tiered.tiers.counts.written == written + 16
    tiered.close()
    tiered = Tiered(driver_of(), disk_in(tmp_path))
    follow = PROMPTS[1] + driver.tokens["long"]
    assert tiered.ask("c", follow)["storage"] == 60, "what was computed before the change, and no more"
    assert tiered.ask("d", PROMPTS[0])["storage"] == 56
    tiered.close()


def test_the_store_is_cleared_by_its_own_call(tmp_path: Path) -> None:
    tiered = Tiered(driver_of(), disk_in(tmp_path))
    in_store(tiered)
    assert tiered.driver.control("clear_hicache_storage") is None
    end = time.monotonic() + 10
    while "clear_hicache_storage" not in tiered.driver.replies:
        tiered.driver.step()
        assert time.monotonic() < end
    reply = tiered.driver.replies["clear_hicache_storage"]
    assert reply.ok and reply.data["pages"] > 60
    assert sum(tiered.ask("b", PROMPTS[0]).values()) == 0
    tiered.driver.control("flush_cache")
    tiered.tiers.flush()
    assert tiered.ask("c", PROMPTS[0])["storage"] == 56, "it was written anew"
    tiered.close()


def test_prompt_logprobs_are_computed_and_the_tiers_give_what_is_before_them(tmp_path: Path) -> None:
    tiered = Tiered(driver_of(), disk_in(tmp_path))
    in_store(tiered)
    tiered.driver.submit("b", PROMPTS[0], 4, return_logprob=True, logprob_start=40)
    tiered.run()
    last = tiered.driver.chunks["b"][-1]
    assert last.cached_tokens == last.cached_storage == 36
    first = tiered.driver.chunks["b"][0].prompt_logprobs
    assert first is not None and len(first.values) == 20
    assert np.isfinite(first.values).all()
    tiered.close()
