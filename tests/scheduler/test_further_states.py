"""Recurrent states beside pages in tiers: prefixes go on from the last state that came back, and never from another."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tier_support import Tiered, disk_in

from phloem.core.memory import Paged, State
from phloem.kvcache.tiers import KEY_BYTES
from phloem.kvcache.tiers._keys import state_keys
from phloem.testing.driver import Driver, random_tokens, storm

both = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
HYBRID = (Paged(1, 1, 1), State((((1,), "float32"),)))
PROMPTS = [random_tokens(random.Random(seed), 60) for seed in range(6)]


def driver_of(**values: Any) -> Driver:
    return Driver((40, 14), 4, **{"memory": HYBRID, "max_slots": 4, **values})


def test_keys_of_states_are_those_of_one_page_and_differ_from_all_others() -> None:
    page, other = bytes(range(KEY_BYTES)), bytes([9, *range(1, KEY_BYTES)])
    keys = state_keys(page, 3)
    assert len({page, other, *keys, *state_keys(other, 3)}) == 8 and keys == state_keys(page, 4)[:3]
    assert all(len(key) == KEY_BYTES and key[:16] == page[:16] for key in keys)


@both
@pytest.mark.parametrize("write", ["write_through", "write_through_selective"])
def test_a_prefix_goes_on_from_its_state(tmp_path: Path, write: str, overlap: bool) -> None:
    tiered = Tiered(driver_of(overlap=overlap), disk_in(tmp_path), 40, write)
    for at, prompt in enumerate(PROMPTS):
        tiered.ask(f"a{at}", prompt)
        if write == "write_through_selective":
            tiered.ask(f"again{at}", prompt)
    tiered.tiers.flush()
    assert tiered.driver.control("flush_cache") is not None
    found = tiered.ask("b", PROMPTS[0])
    assert found == {"device": 0, "host": 0, "storage": 56} and tiered.driver.runner.computed["b"] == 4 + 7
    follow = PROMPTS[0] + tiered.driver.tokens["a0"] + random_tokens(random.Random(9), 10)
    assert sum(tiered.ask("c", follow).values()) >= 56
    assert sum(tiered.ask("d", PROMPTS[1][:50] + PROMPTS[2]).values()) in (0, 48)
    assert not tiered.tiers.counts.failed and not tiered.tiers.counts.dropped
    tiered.close()


@both
def test_it_comes_back_from_host_memory_alone(overlap: bool) -> None:
    tiered = Tiered(driver_of(overlap=overlap), None, 200)
    for at, prompt in enumerate(PROMPTS):
        tiered.ask(f"a{at}", prompt)
    assert tiered.ask("b", PROMPTS[0]) == {"device": 0, "host": 56, "storage": 0}
    tiered.close()


def test_another_process_finds_pages_and_state(tmp_path: Path) -> None:
    tiered = Tiered(driver_of(), disk_in(tmp_path))
    tiered.ask("a", PROMPTS[0])
    tiered.close()
    tiered = Tiered(driver_of(), disk_in(tmp_path))
    assert tiered.ask("b", PROMPTS[0], seed=3)["storage"] == 56
    tiered.close()


def test_pages_without_their_state_are_of_no_use(tmp_path: Path) -> None:
    disk = disk_in(tmp_path)
    tiered = Tiered(driver_of(), disk)
    tiered.ask("a", PROMPTS[0])
    keys: list[bytes] = []
    tiered.tiers._keys.grow("", keys, np.array(PROMPTS[0], np.int32), 14)  # pyright: ignore[reportPrivateUsage]
    assert disk.exists(keys) == 14 and disk.exists(state_keys(keys[13], 3)) == 3
    tiered.tiers.flush()
    tiered.driver.control("flush_cache")
    disk.drop(state_keys(keys[13], 3)[1:2])
    assert sum(tiered.ask("b", PROMPTS[0]).values()) == 0
    tiered.close()


@both
@pytest.mark.parametrize("starved", [False, True])
def test_storms_over_a_small_pool_answer_as_the_oracle(tmp_path: Path, overlap: bool, starved: bool) -> None:
    rng, left = random.Random(5), [40]

    def starve(batch: Any) -> bool:
        left[0] -= starved
        return starved and left[0] % 7 == 0 and left[0] > 0

    driver = Driver((24, 16), 4, 4, memory=HYBRID, overlap=overlap, starve=starve, chunked_prefill_size=16)
    tiered = Tiered(driver, disk_in(tmp_path), 40)
    for turn in range(4):
        want = storm(driver, 24, random.Random(5 + turn // 2), longest=60, most_new=12)
        for name in list(want):
            if rng.random() < 0.1:
                driver.abort(name)
                del want[name]
        tiered.run()
        assert {name: driver.tokens[name] for name in want} == want
        driver.tokens.clear()
        driver.finish.clear()
    assert driver.runner.starved if starved else True
    assert tiered.tiers.counts.loaded > 0
    tiered.close()


def test_a_step_that_never_happened_leaves_the_restored_state_right(tmp_path: Path) -> None:
    failing: list[bool] = []

    def starve(batch: Any) -> bool:
        return bool(failing) and failing.pop()

    tiered = Tiered(driver_of(starve=starve, chunked_prefill_size=16), disk_in(tmp_path), 40)
    for at, prompt in enumerate(PROMPTS):
        tiered.ask(f"a{at}", prompt)
    tiered.tiers.flush()
    tiered.driver.control("flush_cache")
    failing += [True, False]
    assert tiered.ask("b", PROMPTS[1])["storage"] == 56 and tiered.driver.runner.starved == 1
    tiered.close()


def test_few_rows_shorten_what_is_kept_and_no_answer(tmp_path: Path) -> None:
    tiered = Tiered(driver_of(), disk_in(tmp_path), 4)
    for at, prompt in enumerate(PROMPTS):
        tiered.ask(f"a{at}", prompt)
    tiered.tiers.flush()
    tiered.driver.control("flush_cache")
    tiered.ask("b", PROMPTS[0])
    tiered.close()
