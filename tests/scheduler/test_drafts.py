"""A runner that speculates: several tokens a step, the same answers as one at a time."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from byte_grammars import Ready

from phloem.core.batch import Admission, Batch, StepOutput
from phloem.core.memory import Paged, State
from phloem.core.request import SamplingParams
from phloem.testing.driver import EOS, Driver, random_tokens, storm
from phloem.testing.fake_runner import FakeRunner, logprob, oracle

both = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


class Guess:
    """Drafts what will come, each token with this probability; knows the answers beforehand."""

    def __init__(self, seed: int = 0, right: float = 0.7) -> None:
        self.rng = random.Random(seed)
        self.right = right
        self.answers: dict[str, tuple[int, list[int]]] = {}  # request id -> (length of its prompt, its output)
        self.most = 0

    def know(self, name: str, prompt: list[int], answer: list[int]) -> None:
        self.answers[name] = (len(prompt), answer)

    def __call__(self, name: str, position: int, room: int) -> list[int]:
        self.most = max(self.most, room)
        begin, answer = self.answers[name]
        coming = answer[position - begin :][: self.rng.randint(0, room)]
        return [token if self.rng.random() < self.right else 9 for token in coming]


def told(driver: Driver, guess: Guess, count: int, rng: random.Random, **values: Any) -> dict[str, list[int]]:
    """As `storm`, with a drafter that knows the answers."""
    submit = driver.submit

    def knowing(name: str, prompt: list[int], max_new: int | None = 8, seed: int | None = 0, **more: Any) -> None:
        forced = driver.runner.force.get(name)
        guess.know(name, prompt, driver.expected(prompt, max_new or 0, seed or 0, forced))
        submit(name, prompt, max_new, seed, **more)

    driver.submit = knowing  # type: ignore[method-assign]
    return storm(driver, count, rng, **values)


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(6))
def test_answers_are_those_of_plain_decoding(overlap: bool, seed: int) -> None:
    guess, rng = Guess(seed), random.Random(seed)
    driver = Driver(overlap=overlap, drafter=guess, draft_room=rng.choice([1, 3, 7]))
    want = told(driver, guess, 30, rng)
    driver.run()
    assert driver.tokens == want
    assert driver.runner.accepted > 20 and driver.runner.drafted > driver.runner.accepted
    assert {reason.type for reason in driver.finish.values()} == {"stop", "length"}
    assert driver.runner.max_tokens <= 64


@both
def test_prompts_are_measured_beside_drafts(overlap: bool) -> None:
    """Refusals by a predicted wait, deadlines and gateways go by it."""
    guess = Guess(right=1.0)
    driver = Driver(overlap=overlap, chunked_prefill_size=16, drafter=guess, draft_room=4)
    prompt = random_tokens(random.Random(1), 40)
    guess.know("a", prompt, driver.expected(prompt, 20, 0, None))
    driver.submit("a", prompt, 20)
    driver.run()
    assert driver.runner.accepted > 3
    assert driver.scheduler.meter.prefill_tokens == 40 - 3  # chunks of 16, 16 and 8, less one each


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(6))
def test_in_a_tiny_pool_with_preemptions_and_starved_steps(overlap: bool, seed: int) -> None:
    guess, rng = Guess(seed), random.Random(seed)
    driver = Driver(
        num_pages=20,
        overlap=overlap,
        chunked_prefill_size=16,
        drafter=guess,
        draft_room=4,
        starve=lambda batch: batch.num_tokens > 1 and rng.random() < 0.1,
    )
    driver.scheduler.planner.headroom.share = 0.0
    want = told(driver, guess, 30, rng, longest=30)
    driver.run()
    assert driver.tokens == want
    assert driver.scheduler.planner.preemptions > 0 and driver.runner.starved > 2 and driver.runner.accepted > 5


@pytest.mark.slow
@both
@pytest.mark.parametrize("seed", range(4))
def test_aborts_retractions_and_failing_steps_harm_nobody(overlap: bool, seed: int) -> None:
    guess, rng = Guess(seed), random.Random(seed)
    driver = Driver(num_pages=40, overlap=overlap, chunked_prefill_size=16, drafter=guess, draft_room=5)
    want = told(driver, guess, 40, rng)
    for turn in range(120):
        act = rng.randrange(10)
        if act == 0:
            driver.abort(f"q{rng.randrange(40)}")
        elif act == 1:
            driver.scheduler.retract_all()
        elif act == 2 and turn % 5 == 0:
            driver.runner.fail_steps.add(driver.runner.steps + rng.randrange(1, 4))
        driver.step()
    driver.run()
    for name, answer in want.items():
        ended = name in driver.finish and driver.finish[name].type != "abort"
        got = driver.tokens.get(name, [])
        assert got == (answer if ended else answer[: len(got)])


def run_one(driver: Driver, guess: Guess, max_new: int = 20, **values: Any) -> list[int]:
    prompt = [11, 12, 13]
    answer = driver.expected(prompt, max_new, 0, driver.runner.force.get("a"))
    guess.know("a", prompt, answer)
    driver.submit("a", prompt, max_new, **values)
    driver.run()
    return answer


@both
def test_all_right_drafts_take_a_fraction_of_the_steps(overlap: bool) -> None:
    guess = Guess(right=1.0)
    guess.rng.randint = lambda low, high: high  # type: ignore[method-assign,assignment]
    driver = Driver(overlap=overlap, drafter=guess, draft_room=4)
    assert run_one(driver, guess, 21) == driver.tokens["a"]
    # The prompt gives the first token, each step five, and the room ends where the answer does.
    assert driver.runner.steps == 1 + 4 and guess.most == 4
    assert driver.runner.computed["a"] == 3 + 4 and driver.finish["a"].length == 21


@both
@pytest.mark.parametrize("length", range(30, 36))
def test_drafts_behind_a_prompt_in_chunks_wait_for_their_own_step(overlap: bool, length: int) -> None:
    """The last chunk of 33 tokens has one, and drafts already, while the chunk before it is still in flight."""
    guess = Guess(right=1.0)
    driver = Driver(overlap=overlap, drafter=guess, draft_room=4, chunked_prefill_size=16)
    prompt = list(range(11, 11 + length))
    answer = driver.expected(prompt, 20)
    guess.know("a", prompt, answer)
    driver.submit("a", prompt, 20)
    driver.run()
    assert driver.tokens["a"] == answer and driver.runner.accepted > 5


@pytest.mark.parametrize("stop", [EOS, 3], ids=["eos", "stop id"])
def test_an_end_among_accepted_tokens_cuts_the_rest(stop: int) -> None:
    for at in range(3, 12):
        guess = Guess(right=1.0)
        guess.rng.randint = lambda low, high: high  # type: ignore[method-assign,assignment]
        driver = Driver(drafter=guess, draft_room=7)
        driver.runner.force["a"] = {at: stop}
        # The drafter goes on behind the end, and so does the runner.
        prompt = [11, 12, 13]
        whole = [*driver.expected(prompt, 40, 0, {at: stop}), *[9] * 8]
        guess.know("a", prompt, whole)
        driver.submit("a", prompt, 40, stop_token_ids=[3], return_logprob=True, return_hidden=True)
        driver.run()
        got = driver.tokens["a"]
        assert got[-1] == stop and len(got) == at - 2 and driver.finish["a"].matched == stop
        assert driver.joined("a").values == [logprob(token, 3 + i) for i, token in enumerate(got)]
        hidden = [np.frombuffer(state, "<f4").tolist() for chunk in driver.chunks["a"] for state in chunk.hidden]
        assert hidden == [[token, 3 + i] for i, token in enumerate(got)]


@both
def test_min_new_tokens_and_stream_intervals(overlap: bool) -> None:
    guess = Guess(3)
    driver = Driver(overlap=overlap, drafter=guess, draft_room=6, stream_interval=4)
    driver.runner.force["a"] = {6: EOS, 15: EOS}
    prompt = [11, 12, 13]
    plain = Driver()
    plain.runner.force["a"] = {6: EOS, 15: EOS}
    for target in (plain, driver):
        target.submit("a", prompt, 30, min_new_tokens=8)
        if target is plain:
            plain.run()
            guess.know("a", prompt, plain.tokens["a"])
    driver.run()
    assert driver.tokens["a"] == plain.tokens["a"] and len(driver.tokens["a"]) == 13


SCHEMA = {
    "type": "object",
    "properties": {"some_long_name": {"enum": ["first", "second"]}, "number": {"type": "integer"}},
    "required": ["some_long_name", "number"],
    "additionalProperties": False,
}


@both
@pytest.mark.parametrize("jump", [True, False])
def test_under_a_grammar(overlap: bool, jump: bool, constrained: Callable[[bool], Any]) -> None:
    plain = Driver(overlap=False, prepare=constrained(False))
    guess = Guess(5, right=0.8)
    driver = Driver(overlap=overlap, prepare=constrained(jump), drafter=guess, draft_room=5, num_pages=60)
    rng = random.Random(1)
    prompts = {f"r{index}": random_tokens(rng, 8) for index in range(8)}
    for target in (plain, driver):
        for index, (name, prompt) in enumerate(prompts.items()):
            values: dict[str, Any] = {"json_schema": json.dumps(SCHEMA)} if index % 2 else {}
            target.submit(name, prompt, 100 if values else 30, seed=index, **values)
        if target is plain:
            plain.run()
            for name, prompt in prompts.items():
                guess.know(name, prompt, plain.tokens[name])
    driver.run()
    assert driver.tokens == plain.tokens and driver.runner.accepted > 20
    assert (driver.scheduler.results.jumped_tokens > 0) is jump


@both
def test_forced_text_comes_in_steps_of_so_many_tokens_at_most(
    overlap: bool, constrained: Callable[[bool], Any]
) -> None:
    seen: list[int] = []

    def look(batch: Batch) -> bool:
        seen.extend(batch.query_lens[batch.prefix_lens >= 20].tolist())
        return False

    found: list[list[int]] = []
    for most in (0, 5):
        seen.clear()
        driver = Driver(overlap=overlap, prepare=constrained(True), starve=look, forced_tokens=most, page_size=16)
        driver.submit("a", random_tokens(random.Random(2), 20), 100, json_schema=json.dumps(SCHEMA))
        driver.run()
        found.append(driver.tokens["a"])
        assert max(seen) == (most or max(seen)) and max(seen) > 1 and driver.scheduler.results.jumped_tokens > 10
    assert found[0] == found[1]


@both
def test_forced_texts_of_several_requests_share_those_tokens(overlap: bool, constrained: Callable[[bool], Any]) -> None:
    found: list[dict[str, list[int]]] = []
    for most in (0, 6):
        seen: list[int] = []

        def look(batch: Batch, seen: list[int] = seen) -> bool:
            if (batch.prefix_lens >= 20).all():  # no prompts
                seen.append(batch.num_tokens)
            return False

        driver = Driver(overlap=overlap, prepare=constrained(True), starve=look, forced_tokens=most, page_size=16)
        for name in "abcd":
            prompt = random_tokens(random.Random(name), 20)
            driver.submit(name, prompt, 100, json_schema=json.dumps(SCHEMA))
        driver.run()
        found.append(driver.tokens)
        assert max(seen) == 6 if most else max(seen) > 12
        assert driver.scheduler.results.jumped_tokens > 40
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def constrained() -> Any:
    pytest.importorskip("llguidance")
    made = {jump: Ready(jump) for jump in (True, False)}
    yield lambda jump: made[jump]
    for ready in made.values():
        ready.manager.close()


def test_without_room_no_batch_speaks_of_drafts() -> None:
    driver, seen = Driver(drafter=Guess()), list[Any]()
    driver.runner.starve = lambda batch: bool(seen.append(batch.drafts))
    driver.submit("a", [11, 12, 13], 20)
    driver.run()
    assert set(seen) == {None}


def test_room_is_bounded_by_what_is_left_of_answer_budget_and_pages() -> None:
    rooms: list[tuple[int, list[int]]] = []

    def look(batch: Batch) -> bool:
        rooms.append((batch.num_tokens, [] if batch.drafts is None else batch.drafts.tolist()))
        return False

    driver = Driver(starve=look, draft_room=50, chunked_prefill_size=20, overlap=False)
    driver.submit("a", [11, 12, 13], 9)
    driver.run()
    assert [room for _, room in rooms] == [[], [7], [6], [5], [4], [3], [2], [1], []]
    rooms.clear()
    for name in "abc":
        driver.finish.clear()
        driver.submit(name + "2", [11, 12, ord(name)], 100)
    driver.step(3)
    assert rooms[-1] == (3, [5, 5, 5])
    rooms.clear()
    driver.submit("long", random_tokens(random.Random(1), 60), 1)
    driver.step(2)
    assert rooms[0] == (20, [])  # a prompt comes first
    assert all(tokens + sum(room) <= 20 for tokens, room in rooms)
    tight = Driver(num_pages=5, starve=look, draft_room=50, overlap=False)
    rooms.clear()
    tight.submit("a", [11, 12, 13], None)
    tight.run()
    assert rooms[1] == (1, [12]) and tight.finish["a"].length == 14


def test_a_row_that_speculates_is_not_launched_again_before_its_commit() -> None:
    """A prompt goes on beside it; rows that are ready meanwhile wait to share its next step."""
    driver = Driver(overlap=True, draft_room=3, chunked_prefill_size=16)
    rows: list[set[str]] = []
    launch = driver.runner.launch

    def record(batch: Batch) -> Any:
        names = {driver.scheduler.slots.at(slot).id for slot in batch.slots.tolist()}
        rows.append(names)
        flying = [{row.id for row in launched.plan.rows} for launched in driver.scheduler.inflight]
        speculating = [
            {launched.plan.rows[row].id for row in np.flatnonzero(launched.plan.batch.outputs).tolist()}
            for launched in driver.scheduler.inflight
        ]
        assert not any(names & other for other in speculating), (names, flying)
        return launch(batch)

    driver.runner.launch = record  # type: ignore[method-assign]
    driver.submit("a", [11, 12, 13], 30)
    driver.step(3)
    driver.submit("b", random_tokens(random.Random(1), 40), 30)
    driver.run()
    assert {"b"} in rows and {"a", "b"} in rows
    last = rows[rows.index({"a", "b"}) :]
    together = sum(len(names) == 2 for names in last)
    assert together >= len(last) // 2 - 1, "they take turns with half a batch each"


def test_more_tokens_than_there_was_room_for_fail_their_row_alone() -> None:
    driver = Driver(overlap=False)
    launch = driver.runner.launch

    def twice(batch: Batch) -> Any:
        pending = launch(batch)
        output = pending._output
        if isinstance(output, StepOutput) and len(output.counts) == 2 and output.counts.all():
            output.counts = output.counts + np.array([0, 1], np.int32)
            output.tokens = np.append(output.tokens, np.int32(9))
        return pending

    driver.runner.launch = twice  # type: ignore[method-assign]
    driver.submit("a", [11, 12, 13], 12)
    driver.submit("b", [11, 12, 14], 12)
    driver.run()
    assert driver.tokens["a"] == driver.expected([11, 12, 13], 12)
    assert driver.finish["b"].status_code == 500 and "2 tokens, with room for 0" in str(driver.finish["b"].message)


def test_a_batch_is_plain_data(constrained: Callable[[bool], Any]) -> None:
    """It could be sent to another process: what comes out there is equal."""
    batches: list[Batch] = []
    guess = Guess(right=1.0)
    driver = Driver(drafter=guess, draft_room=4, prepare=constrained(False), chunked_prefill_size=16)
    launch = driver.runner.launch

    def send(batch: Batch) -> Any:
        batches.append(batch)
        copy = pickle.loads(pickle.dumps(batch))
        assert same(copy, batch)
        return launch(copy)

    driver.runner.launch = send  # type: ignore[method-assign]
    prompt = random_tokens(random.Random(2), 30)
    guess.know("a", prompt, driver.expected(prompt, 20))
    guess.know("b", prompt, [])
    driver.submit("a", prompt, 20, return_logprob=True, logprob_start=0)
    driver.submit("b", prompt, 60, json_schema=json.dumps(SCHEMA), stop_token_ids=[5])
    driver.run()
    assert driver.tokens["a"] == driver.expected(prompt, 20)
    assert any(batch.drafts is not None for batch in batches) and any(batch.prompt_targets for batch in batches)
    assert {admission.constrained for batch in batches for admission in batch.admissions} == {True, False}


def same(left: Any, right: Any) -> bool:
    """Equal all the way down, arrays and their types included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    slots = getattr(type(left), "__slots__", None)
    if slots and not isinstance(left, str | bytes | int | float):
        names = getattr(type(left), "__struct_fields__", slots)
        return all(same(getattr(left, name), getattr(right, name)) for name in names)
    return left == right


def test_the_toy_runner_reads_every_group_of_memory() -> None:
    """A window of pages and a state beside the full pages, tables by hand; drafts leave only what was accepted."""
    memory = (Paged(1, 1, 1), State((((1,), "float32"),)), Paged(1, 1, 1, window=3))
    driver = Driver()
    prompt = [11, 12, 13, 14, 15]
    answer = oracle(prompt, 7, 12, 1000, memory=memory)
    assert answer != driver.expected(prompt, 12, 7)
    runner = FakeRunner(8, 4, 2, memory=memory, drafter=lambda name, at, room: [*answer[at - 5 :][: room - 1], 9])
    assert [group.kind for group in runner.groups] == ["pages", "pages", "state"]
    tokens, read, write, first = list[int](), 1, 2, True
    while len(tokens) < 12:
        ids = prompt if first else tokens[-1:]
        computed = 0 if first else len(prompt) + len(tokens) - 1
        full, window = np.array([[1, 2, 3, 4, 5]], np.int32), np.array([[6, 7, 3, 4, 5]], np.int32)
        window[0, : max(0, computed - 2) // 4] = 0  # what the window has left behind
        batch = Batch(
            step=1,
            slots=np.zeros(1, np.int32),
            query_lens=np.array([len(ids)], np.int32),
            prefix_lens=np.array([computed], np.int32),
            input_ids=np.array(ids, np.int32),
            tables=(full, window, np.array([[read, write]], np.int32)),
            outputs=np.ones(1, np.int32),
            admissions=[Admission(0, "a", SamplingParams(), 7, np.array(prompt, np.int32), 5)] if first else [],
            drafts=None if first else np.array([3], np.int32),
        )
        output = runner.launch(batch).result()
        tokens += output.tokens.tolist()
        assert len(output.tokens) == output.counts[0] == (1 if first else 3)
        first, read, write = False, write, read
    assert tokens[:12] == answer
