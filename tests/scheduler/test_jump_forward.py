"""Forced text is appended at once and computed as a chunk: same answers, fewer steps, whatever else happens."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from byte_grammars import FIRST, Ready, text_of

from phloem.core.request import RequestStatus
from phloem.testing.driver import EOS, Driver, random_tokens
from phloem.testing.fake_runner import oracle

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "a_rather_long_property_name": {"enum": ["first", "second", "third"]},
        "another_long_property_name": {"type": "integer", "minimum": 100, "maximum": 999},
        "the_last_property": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["a_rather_long_property_name", "another_long_property_name", "the_last_property"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def jumping() -> Any:
    made = Ready(True)
    yield made
    made.manager.close()


@pytest.fixture(scope="module")
def stepping() -> Any:
    made = Ready(False)
    yield made
    made.manager.close()


def run(prepare: Any, overlap: bool, count: int = 6, **settings: Any) -> Driver:
    """`count` constrained requests and as many free ones, together."""
    driver = Driver(prepare=prepare, overlap=overlap, **settings)
    rng = random.Random(7)
    for index in range(count):
        prompt = random_tokens(rng, rng.randint(1, 30))
        driver.submit(f"json {index}", prompt, 200, seed=index, json_schema=json.dumps(SCHEMA))
        driver.submit(f"free {index}", prompt, 40, seed=index)
    driver.run()
    return driver


@pytest.fixture(scope="module")
def expected(stepping: Any) -> dict[str, list[int]]:
    return run(stepping, overlap=False).tokens


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pages", [400, 45], ids=["room", "pressure"])
@pytest.mark.parametrize("chunk", [64, 9])
def test_the_answers_are_the_same(
    expected: dict[str, list[int]], jumping: Any, overlap: bool, pages: int, chunk: int
) -> None:
    driver = run(jumping, overlap, num_pages=pages, chunked_prefill_size=chunk, max_running_requests=5)
    assert driver.tokens == expected
    assert driver.scheduler.results.jumped_tokens > 100
    if pages == 45:
        assert driver.scheduler.planner.preemptions > 0
    for name, tokens in driver.tokens.items():
        if name.startswith("json"):
            assert set(json.loads(text_of(tokens))) == set(SCHEMA["properties"]), name
            assert tokens[-1] == EOS and driver.finish[name].type == "stop"


@pytest.mark.parametrize(("overlap", "gain"), [(False, 2.5), (True, 2.0)])
def test_it_takes_fewer_steps(jumping: Any, stepping: Any, overlap: bool, gain: float) -> None:
    steps: dict[str, int] = {}
    for name, prepare in (("jump", jumping), ("step", stepping)):
        driver = Driver(prepare=prepare, overlap=overlap)
        for index in range(4):
            driver.submit(f"r{index}", [11, 12], 200, seed=index, json_schema=json.dumps(SCHEMA))
        driver.run()
        steps[name] = driver.runner.steps
    assert steps["step"] >= gain * steps["jump"], steps


def test_what_is_forced_is_in_the_cache(jumping: Any) -> None:
    driver = Driver(prepare=jumping, page_size=4)
    driver.submit("a", [11, 12, 13], 200, json_schema=json.dumps(SCHEMA))
    driver.run()
    computed = driver.runner.computed_tokens
    driver.submit("b", [11, 12, 13], 200, json_schema=json.dumps(SCHEMA))
    driver.run()
    assert driver.tokens["a"] == driver.tokens["b"]
    beginning = len('{"a_rather_long_property_name":"') // 4 * 4
    assert driver.runner.computed_tokens - computed <= computed - beginning


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pages", [200, 45], ids=["room", "pressure"])
def test_what_is_forced_before_admission_is_no_part_of_the_prompt(jumping: Any, overlap: bool, pages: int) -> None:
    driver = Driver(prepare=jumping, overlap=overlap, num_pages=pages)
    prompts = {f"r{index}": [11, 12, 13, 14, 15][: 1 + index % 5] for index in range(20)}
    for name, prompt in prompts.items():
        driver.submit(name, prompt, 200, json_schema=json.dumps(SCHEMA))
        driver.step(3)
    driver.step(9)
    if pages == 45:
        assert driver.scheduler.planner.preemptions > 0
    driver.control("pause", mode="retract")
    driver.step(3)
    driver.control("resume")
    driver.run()
    cached = {name: driver.chunks[name][-1].cached_tokens for name in prompts}
    assert all(0 <= cached[name] <= len(prompt) for name, prompt in prompts.items()), cached
    state = driver.scheduler.planner.state()
    assert state["prompt_tokens"] == sum(map(len, prompts.values()))
    assert state["cached_tokens"] == sum(cached.values()) > 0
    assert 0 < state["cache_hit_rate"] <= 1


def test_a_text_that_is_forced_whole_needs_no_step(jumping: Any) -> None:
    driver = Driver(prepare=jumping)
    driver.submit("a", [11], 50, regex="yes")
    driver.step()
    driver.run()
    assert text_of(driver.tokens["a"]) == "yes" and driver.finish["a"].matched == EOS
    assert driver.runner.steps == 0


def test_the_length_limit_cuts_a_forced_text(jumping: Any) -> None:
    driver = Driver(prepare=jumping)
    driver.submit("a", [11], 9, json_schema=json.dumps(SCHEMA))
    driver.run()
    assert text_of(driver.tokens["a"]) == '{"a_rathe' and driver.finish["a"].length == 9
    driver.submit("none", [11], 0, json_schema=json.dumps(SCHEMA))
    driver.run()
    assert driver.tokens["none"] == [] and driver.finish["none"].type == "length"


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_tokens_count_inside_a_forced_text(jumping: Any, overlap: bool) -> None:
    stop = FIRST + ord("_")
    driver = Driver(prepare=jumping, overlap=overlap)
    driver.submit("a", [11], 90, regex="(x|y)stop_here_now", stop_token_ids=[stop])
    driver.run()
    assert text_of(driver.tokens["a"])[1:] == "stop_" and driver.finish["a"].matched == stop
    driver.submit("late", [11], 90, regex="(x|y)stop_here_now", stop_token_ids=[stop], min_new_tokens=8)
    driver.run()
    assert text_of(driver.tokens["late"])[1:] == "stop_here_"


def test_ignore_eos_goes_on_to_the_limit(jumping: Any) -> None:
    driver = Driver(prepare=jumping)
    driver.submit("a", [11], 12, regex="abc", ignore_eos=True)
    driver.run()
    assert driver.tokens["a"] == [FIRST + byte for byte in b"abc"] + [EOS] * 9
    assert driver.finish["a"].type == "length"


def test_logprobs_and_penalties_turn_it_off(jumping: Any, expected: dict[str, list[int]]) -> None:
    driver = Driver(prepare=jumping)
    driver.submit("a", [11, 12], 200, json_schema=json.dumps(SCHEMA), return_logprob=True)
    driver.submit("b", [11, 12], 200, json_schema=json.dumps(SCHEMA), presence_penalty=0.5)
    driver.run()
    assert driver.scheduler.results.jumped_tokens == 0
    values = [value for chunk in driver.chunks["a"] if chunk.logprobs for value in chunk.logprobs.values]
    assert len(values) == len(driver.tokens["a"])
    assert driver.tokens["a"] == driver.tokens["b"]


def test_a_held_request_may_be_aborted_or_retracted(jumping: Any, expected: dict[str, list[int]]) -> None:
    driver = Driver(prepare=jumping, overlap=True)
    for name in ("gone", "back"):
        driver.submit(name, [11, 12], 200, seed=3, json_schema=json.dumps(SCHEMA))
    driver.submit("free", [21, 22], 60, seed=4)
    for _ in range(100):
        driver.step()
        if driver.scheduler.slots._held:
            break
    assert driver.scheduler.slots._held, "nobody was held back"
    driver.abort("gone")
    driver.control("pause", mode="retract")
    driver.step(3)
    assert driver.scheduler.live["back"].status is RequestStatus.WAITING
    driver.control("resume")
    driver.run()
    assert not driver.scheduler.slots._held
    json.loads(text_of(driver.tokens["back"]))
    assert driver.tokens["free"] == oracle([21, 22], 4, 60, 1000)


def test_a_step_that_fails_takes_nothing_along(jumping: Any) -> None:
    driver = Driver(prepare=jumping, overlap=True)
    driver.runner.fail_steps = {4}
    for index in range(3):
        driver.submit(f"r{index}", [11, 12, index], 200, seed=index, json_schema=json.dumps(SCHEMA))
    driver.run()
    driver.submit("after", [11, 12], 200, seed=9, json_schema=json.dumps(SCHEMA))
    driver.run()
    ends = {driver.finish[f"r{index}"].type for index in range(3)}
    assert "abort" in ends and ends <= {"abort", "stop"}
    json.loads(text_of(driver.tokens["after"]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_traffic(jumping: Any, stepping: Any, seed: int) -> None:
    """Aborts, pressure, small chunks: whoever is not aborted answers what it answers alone, step by step."""
    rng = random.Random(seed)
    driver = Driver(
        prepare=jumping,
        overlap=bool(seed % 2),
        num_pages=rng.choice([50, 90]),
        chunked_prefill_size=rng.choice([5, 33]),
    )
    alone = Driver(prepare=stepping, overlap=False)
    aborted: set[str] = set()
    for index in range(14):
        prompt = random_tokens(rng, rng.randint(1, 40), kinds=3)
        values: dict[str, Any] = rng.choice(
            [{}, {"json_schema": json.dumps(SCHEMA)}, {"regex": "(left|right|leftover): [0-9]{1,3}(, done|, not done)"}]
        )
        for target in (driver, alone):
            target.submit(f"r{index}", prompt, 150 if values else 20, seed=index, **values)
        driver.step(rng.randint(0, 6))
        if rng.random() < 0.15:
            name = f"r{rng.randint(0, index)}"
            driver.abort(name)
            aborted.add(name)
    driver.run()
    alone.run()
    for name in driver.finish:
        if name not in aborted:
            assert driver.tokens[name] == alone.tokens[name], name


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_steps_without_memory_change_no_answer(
    expected: dict[str, list[int]], jumping: Any, overlap: bool, seed: int
) -> None:
    rng = random.Random(seed)
    driver = run(jumping, overlap, starve=lambda batch: batch.num_tokens > 1 and rng.random() < 0.25)
    assert driver.tokens == expected and driver.runner.starved > 5


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_grammar_that_gets_stuck_ends_its_request_alone(
    jumping: Any, stepping: Any, jump: bool, overlap: bool
) -> None:
    driver = Driver(prepare=jumping if jump else stepping, overlap=overlap)
    driver.submit("free", random_tokens(random.Random(1), 9), 30)
    driver.submit("stuck", random_tokens(random.Random(2), 9), 30, ebnf="start: A X\nA: /[a-d]{6}/\nX: /c+/ & /d+/\n")
    driver.run()
    reason = driver.finish["stuck"]
    assert (reason.type, reason.status_code) == ("abort", 400)
    assert str(reason.message).startswith("ebnf: the grammar admits no text")
    assert len(driver.tokens["stuck"]) <= 6
    assert driver.tokens["free"] == driver.expected(random_tokens(random.Random(1), 9), 30)
