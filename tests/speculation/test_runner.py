"""The runner that speculates, around a made-up one: what it sends, what it learns, when it lets steps overlap."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phloem.core.batch import Batch, StepOutput
from phloem.core.errors import OutOfMemory
from phloem.core.speculation import Wanted
from phloem.kvcache.manager import CacheManager
from phloem.scheduler.scheduler import Scheduler, ScheduleSettings
from phloem.speculation.controller import Controller
from phloem.speculation.drafters import of_texts
from phloem.speculation.runner import SpeculativeRunner, with_drafts
from phloem.testing.driver import EOS, Driver, random_tokens, storm
from phloem.testing.fake_runner import FakePending, FakeRunner


class Verifying(FakeRunner):
    """Takes drafts behind tokens, as an engine's runner does: the toy runner's own, handed over as its drafter's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.draft_room = 0
        self.sizes = list[int]()

    def launch(self, batch: Batch) -> FakePending[StepOutput]:
        more = np.maximum(batch.outputs - 1, 0).astype(np.int32)
        self.sizes.append(batch.num_tokens if (batch.query_lens == batch.outputs).all() else 0)
        kept = np.ones(batch.num_tokens, np.bool_)
        said: dict[int, list[int]] = {}
        for row, end in enumerate(np.cumsum(batch.query_lens).tolist()):
            kept[end - more[row] : end] = False
            said[int(batch.slots[row])] = batch.input_ids[end - int(more[row]) : end].tolist()
        by_name = dict[str, list[int]]()

        def drafter(name: str, position: int, room: int) -> list[int]:
            return by_name[name]

        self.drafter = drafter
        for admission in batch.admissions:
            by_name[admission.request_id] = said[admission.slot]
        for slot, drafts in said.items():
            if slot in self._slots:
                by_name.setdefault(self._slots[slot].admission.request_id, drafts)
        own = replace(
            batch,
            query_lens=batch.query_lens - more,
            outputs=np.minimum(batch.outputs, 1),
            input_ids=batch.input_ids[kept],
            drafts=more,
        )
        return super().launch(own)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def speculating(driver: Driver, adaptive: bool = False, room: int = 5, **settings: Any) -> SpeculativeRunner:
    """The driver's scheduler, on a runner that speculates."""
    old = driver.runner
    driver.runner = inner = Verifying(
        old.num_pages, old.page_size, old.max_slots, starve=old.starve, fail_row=old.fail_row
    )
    inner.force = old.force
    driver.cache = CacheManager(inner.groups, inner.num_pages, inner.page_size)
    wanted = Wanted(drafts=room)
    runner = SpeculativeRunner(inner, of_texts("suffix")(wanted), Controller(room, 24, adaptive), room, clock=Clock())
    values: dict[str, Any] = {
        "max_running_requests": old.max_slots,
        "context_length": 10_000,
        "vocab_size": inner.vocab_size,
        "eos_ids": (EOS,),
        "chunked_prefill_size": 64,
        "random_seed": 1,
        "debug_invariants": True,
        "speculates": True,
        **settings,
    }
    driver.scheduler = Scheduler(runner, ScheduleSettings(**values), driver.cache, driver._take, driver.clock)
    return runner


def repeating(driver: Driver, name: str, prompt: list[int], count: int, period: int = 4) -> list[int]:
    """Force an answer that repeats itself, so that there is something to draft."""
    answer = [20 + place % period for place in range(count)]
    driver.runner.force[name] = {len(prompt) + place: token for place, token in enumerate(answer)}
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_plain_decoding(overlap: bool, adaptive: bool, seed: int) -> None:
    driver = Driver(num_pages=60)
    runner = speculating(driver, adaptive, overlap=overlap)
    want = storm(driver, 25, random.Random(seed))
    for number in range(6):
        prompt = random_tokens(random.Random(number), 10)
        want[f"loop{number}"] = repeating(driver, f"loop{number}", prompt, 60)
        driver.submit(f"loop{number}", prompt, 60)
    driver.run()
    assert driver.tokens == want and driver.scheduler.planner.preemptions >= 0
    assert driver.runner.accepted > 50 or adaptive
    assert runner._inflight == 0


def test_a_step_without_memory_never_happened() -> None:
    rng = random.Random(3)

    def starve(batch: Batch) -> bool:
        return batch.step > 3 and rng.random() < 0.1

    driver = Driver(starve=starve)
    speculating(driver)
    want = storm(driver, 12, random.Random(4))
    for number in range(3):
        prompt = random_tokens(random.Random(number), 6)
        want[f"loop{number}"] = repeating(driver, f"loop{number}", prompt, 40)
        driver.submit(f"loop{number}", prompt, 40)
    driver.run()
    assert driver.tokens == want and driver.runner.starved > 3 and driver.runner.accepted > 20


def test_steps_overlap_until_drafts_pay_and_again_when_they_are_over() -> None:
    driver = Driver()
    runner = speculating(driver, adaptive=True, overlap=True)
    prompt = random_tokens(random.Random(1), 8)
    answer = [*range(100, 130), *[20, 21, 22, 23] * 20, *range(200, 230)]
    driver.runner.force["a"] = {8 + place: token for place, token in enumerate(answer)}
    driver.submit("a", prompt, 140)
    ons = list[bool]()
    while driver.scheduler.live:
        driver.step()
        ons.append(runner.controller.on)
    assert driver.tokens["a"] == answer
    assert not any(ons[:25]) and any(ons) and not ons[-1]
    assert len(ons) < 110 and driver.runner.accepted > 40


def test_what_a_verified_step_teaches_is_taken_in_behind_the_next_launch() -> None:
    driver = Driver()
    runner = speculating(driver)
    prompt = random_tokens(random.Random(1), 8)
    repeating(driver, "a", prompt, 60)
    driver.submit("a", prompt, 60)
    late = list[bool]()
    launch = runner.inner.launch

    def noted(batch: Batch) -> Any:
        late.append(runner._late is not None)
        return launch(batch)

    runner.inner.launch = noted  # type: ignore[method-assign]
    driver.run()
    assert sum(late) > 4 and runner._late is not None
    assert runner.prepared["speculation"]["acceptance"] and runner._late is None


def test_what_was_verified_is_told_with_the_last_chunk_and_counted() -> None:
    driver = Driver()
    speculating(driver)
    prompt = random_tokens(random.Random(1), 8)
    repeating(driver, "a", prompt, 50)
    driver.submit("a", prompt, 50)
    driver.run()
    jumped, drafted, *right = driver.chunks["a"][-1].drafts
    accepted = sum(count * steps for count, steps in enumerate(right))
    assert jumped == 0 and drafted >= accepted > 20 and sum(right) < 30
    state = driver.scheduler.state()
    assert state["spec_accepted"] == accepted and state["spec_drafted"] == drafted
    assert state["spec_accept_length"] == pytest.approx(50 / (50 - accepted))
    assert 0 < state["spec_accept_rate"] <= 1 and state["spec_verify_calls"] == sum(right)
    assert driver.stats[-1].spec_accepted == accepted
    assert "own 17-32" in state["prepared"]["speculation"]["acceptance"]


def test_an_ended_row_tells_no_token_behind_its_end() -> None:
    driver = Driver()
    speculating(driver)
    prompt = random_tokens(random.Random(1), 8)
    driver.runner.force["a"] = {8 + place: token for place, token in enumerate([20, 21, 22, 23] * 6)}
    driver.submit("a", prompt, 24, stop_token_ids=[23])
    driver.run()
    assert driver.tokens["a"] == [20, 21, 22, 23] and driver.finish["a"].type == "stop"


def test_drafts_stand_behind_their_rows_tokens() -> None:
    def ints(*values: int) -> NDArray[np.int32]:
        return np.array(values, np.int32)

    batch = Batch(
        0, ints(3, 1, 0), ints(1, 2, 1), ints(5, 0, 9), ints(7, 8, 9, 6), (), ints(1, 0, 1), drafts=ints(4, 0, 4)
    )
    found = with_drafts(batch, {0: [70, 71], 2: [60]})
    assert found.input_ids.tolist() == [7, 70, 71, 8, 9, 6, 60] and found.input_ids.dtype == np.int32
    assert found.query_lens.tolist() == [3, 2, 2] and found.outputs.tolist() == [3, 0, 2] and found.drafts is None
    assert batch.input_ids.tolist() == [7, 8, 9, 6]


def test_a_failed_step_raises_what_it_raised() -> None:
    class Broken:
        def done(self) -> bool:
            return True

        def result(self) -> StepOutput:
            raise OutOfMemory("none")

    driver = Driver()
    runner = speculating(driver)
    runner.inner.launch = lambda batch: Broken()  # type: ignore[method-assign]
    driver.submit("a", [5, 6, 7], 4)
    plan = driver.scheduler.planner.next_batch()
    assert plan is not None
    launched = runner.launch(plan.batch)
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            launched.result()
    assert runner._inflight == 0
