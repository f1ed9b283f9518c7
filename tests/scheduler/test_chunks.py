"""Chunks of a prompt that take equal time: what a token costs behind others, how it is learnt, and whole prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.core.batch import Batch
from phloem.core.config import Config
from phloem.scheduler.chunks import ENOUGH, LEAST, Chunks, Price, Sample, ratio_of
from phloem.testing.driver import Driver

ratios = st.floats(1e-7, 1e-1)
counts = st.integers(1, 20_000)


def cost(ratio: float, tokens: int, start: int) -> float:
    """In tokens that have nothing before them and attend to nothing: counted pair by pair, twice."""
    return sum(1 + ratio * (2 * (start + at) + 1) for at in range(tokens))


@given(ratios, st.integers(1, 500), st.integers(0, 5000))
def test_what_is_bought_is_what_the_money_is_worth(ratio: float, left: int, start: int) -> None:
    price = Price(ratio)
    count = price.most(left, start)
    assert 1 <= count <= left
    worth = cost(ratio, left, 0) * (1 + 1e-6)
    assert count <= max(1, left // LEAST) or cost(ratio, count, start) <= worth
    assert count == left or cost(ratio, count + 1, start) >= worth * (1 - 3e-6)
    rest = price.left(left, start, count)
    assert 0 <= rest <= left - count
    assert cost(ratio, rest, 0) <= max(0.0, worth - cost(ratio, count, start)) + 1e-6


@given(ratios, counts, counts, st.integers(1, 5000))
def test_more_before_a_token_never_buys_more(ratio: float, left: int, start: int, more: int) -> None:
    price = Price(ratio)
    assert price.most(left, start + more) <= price.most(left, start) <= left
    assert price.most(left, 0) == left and price.left(left, 0, left) == 0
    assert Price().most(left, start) == left and Price().left(left, start, 0) == left


def plan(price: Price, budget: int, prompt: int) -> list[int]:
    found: list[int] = []
    while sum(found) < prompt:
        found.append(min(price.most(budget, sum(found)), prompt - sum(found)))
    return found


def test_chunks_of_a_long_prompt_take_equal_time() -> None:
    """Attention costs what everything else does at 8,192 tokens; a stage that waits for the last chunk of a prompt of
    65,536 waits no longer than for the first. Fixed chunks take seven times as long in the end."""
    budget, prompt, ratio = 2048, 65_536, 1 / (2 * 8192)
    chunks = plan(Price(ratio), budget, prompt)
    assert sum(chunks) == prompt and chunks[0] == budget
    assert all(after < before for before, after in pairwise(chunks[:-1]) if after > budget // LEAST)
    assert min(chunks[:-1]) == budget // LEAST, "no chunk but the last is below a quarter"

    def seconds(sizes: list[int]) -> list[float]:
        starts = [0, *accumulate(sizes)][: len(sizes)]
        return [cost(ratio, size, start) for start, size in zip(starts, sizes, strict=True)]

    free = [took for took, size in zip(seconds(chunks), chunks, strict=True) if size > budget // LEAST]
    assert len(free) > 20 and max(free) <= 1.005 * min(free)
    fixed = seconds(plan(Price(), budget, prompt))
    assert fixed[-1] > 7 * fixed[0] and fixed[-1] > 3 * max(seconds(chunks))


def samples(chunk: Callable[[int], int], count: int, noise: float = 0.0) -> list[Sample]:
    """Of one prompt, by (a, b, c) = (0.5 us, 1 ms, 20 ms)."""
    draw, found, start = np.random.default_rng(1), list[Sample](), 0
    for number in range(count):
        x = chunk(number)
        pairs = x * (x + 2 * start)
        seconds = (5e-7 * pairs + 1e-3 * x + 0.02) * (1 + noise * draw.standard_normal())
        found.append(Sample(x, pairs, seconds))
        start += x
    return found


def test_the_ratio_is_found_in_steps_of_several_sizes() -> None:
    assert ratio_of(samples(lambda number: 64 + 16 * (number % 5), 20)) == pytest.approx(5e-4, rel=1e-6)
    noisy = samples(lambda number: 64 + 16 * (number % 5), 64, noise=0.01)
    assert ratio_of(noisy) == pytest.approx(5e-4, rel=0.2)


def test_a_step_that_something_else_held_up_is_left_out() -> None:
    found = samples(lambda number: 64 + 16 * (number % 5), 20)
    found[4] = replace(found[4], seconds=found[4].seconds + 3.0)
    assert ratio_of(found) == pytest.approx(5e-4, rel=1e-3)


def test_of_chunks_of_one_size_what_a_step_costs_counts_with_its_tokens() -> None:
    assert ratio_of(samples(lambda _: 128, 20)) == pytest.approx(5e-7 / (1e-3 + 0.02 / 128), rel=1e-6)


def test_what_tells_nothing_changes_nothing() -> None:
    same = [Sample(64, 64 * 64, 0.1)] * 20
    assert ratio_of(same) is None
    falling = [Sample(64, 64 * (64 + 128 * at), 0.1 - 0.001 * at) for at in range(20)]
    assert ratio_of(falling) == 0.0, "later tokens cost no more"
    chunks = Chunks()
    for sample in samples(lambda _: 64, ENOUGH - 1):
        chunks.took(sample)
    assert chunks.price == Price(), "too few"
    chunks.took(Sample(64, 1e6, 0.0))
    assert chunks.price.ratio == 0.0, "a step that took no time was not measured"
    for sample in samples(lambda _: 64, 2 * ENOUGH):
        chunks.took(sample)
    assert chunks.price.ratio > 1e-4


def rows(query: list[int], prefix: list[int]) -> Batch:
    zeros = np.zeros(len(query), np.int32)
    ids = np.zeros(sum(query), np.int32)
    return Batch(1, zeros, np.array(query, np.int32), np.array(prefix, np.int32), ids, (), zeros)


def test_steps_that_decode_much_tell_nothing_of_prompts() -> None:
    chunks = Chunks()
    for at in range(4 * ENOUGH):
        chunks.saw(rows([1] * 8 + [32], [5] * 8 + [32 * at]), 0.01 * at + 0.01)
    assert chunks.price.ratio == 0.0
    for at in range(4 * ENOUGH):
        chunks.saw(rows([1, 32], [5, 32 * at]), 0.01 * at + 0.01)
    assert chunks.price.ratio > 0.0


def driver(seconds: Callable[[Batch], float], **values: Any) -> tuple[Driver, list[Batch]]:
    """One whose steps take as long as is said, and its batches."""
    found, seen = Driver(num_pages=2000, dynamic_chunks=True, **values), list[Batch]()
    inner = found.runner.launch

    def launch(batch: Batch) -> Any:
        pending = inner(batch)
        pending.result().forward_seconds = seconds(batch)
        seen.append(batch)
        return pending

    found.runner.launch = launch  # type: ignore[method-assign]
    return found, seen


def quadratic(batch: Batch) -> float:
    x, before = batch.query_lens.astype(float), batch.prefix_lens.astype(float)
    return float(1e-3 * x.sum() + 1e-5 * (x * (x + 2 * before)).sum() + 0.002)


def chunks_of(seen: list[Batch], row: int = 0) -> list[int]:
    return [int(batch.query_lens[row]) for batch in seen if batch.query_lens[row] > 1]


def test_a_scheduler_learns_and_gives_the_same_tokens() -> None:
    prompt = [11 + at % 800 for at in range(1500)]
    plain = Driver(num_pages=2000)
    plain.submit("long", prompt, 5)
    while "long" not in plain.finish:
        plain.step()
    found, seen = driver(quadratic)
    for name in ("long", "again"):
        seen.clear()
        found.submit(name, prompt if name == "long" else [11 + at % 700 for at in range(3, 1503)], 5)
        while name not in found.finish:
            found.step()
        sizes = chunks_of(seen)
        assert sum(sizes) in (1499, 1500), "all of it, but for a last token alone"
    assert found.tokens["long"] == plain.tokens["long"]
    assert found.scheduler.state()["attention_price"] == pytest.approx(1e-2, rel=0.15)
    assert sizes[0] == 64 and min(sizes[:-1]) == 16, "what was learnt of one prompt serves the next from its beginning"
    assert all(after <= before for before, after in pairwise(sizes[:-1]))
    free = [quadratic(batch) for batch in seen if batch.query_lens[0] > 16 and batch.num_rows == 1]
    assert max(free[:-1]) <= 1.1 * min(free[:-1])


def test_several_prompts_share_what_a_step_may_take() -> None:
    """What the first leaves is worth more to one with less before it; no step is dearer than its budget is."""
    found, seen = driver(quadratic)
    found.scheduler.planner.chunks = chunks = Chunks()
    chunks.price = Price(1e-2)
    chunks.took = lambda sample: None  # type: ignore[method-assign]
    prompts = {"a": 700, "b": 9, "c": 30, "d": 400}
    for number, (name, length) in enumerate(prompts.items()):
        found.submit(name, [11 + (at * (number + 3)) % 800 for at in range(length)], 3)
    while len(found.finish) < 4:
        found.step()
    assert sum(int(batch.query_lens[batch.query_lens > 1].sum()) for batch in seen) <= sum(prompts.values())
    for batch in seen:
        assert batch.num_tokens <= 64
        alone = (batch.query_lens > 1).sum() == 1 and batch.num_tokens - (batch.query_lens == 1).sum() <= 16
        worth = cost(1e-2, 64, 0)
        spent = sum(
            cost(1e-2, int(x), int(before))
            for x, before in zip(batch.query_lens, batch.prefix_lens, strict=True)
            if x > 1
        )
        # A quarter is taken whatever it costs; one part of a step is kept for others, and has a quarter of its own.
        dearest = max((cost(1e-2, 16, int(before)) for before in batch.prefix_lens), default=0.0)
        assert alone or spent <= worth + 2 * dearest


def test_the_first_chunk_behind_a_long_cached_prefix_is_a_small_one() -> None:
    found, seen = driver(quadratic)
    found.scheduler.planner.chunks = chunks = Chunks()
    chunks.price = Price(1e-2)
    chunks.took = lambda sample: None  # type: ignore[method-assign]
    prompt = [11 + at % 800 for at in range(1000)]
    found.submit("first", prompt, 3)
    while "first" not in found.finish:
        found.step()
    seen.clear()
    found.submit("second", [*prompt[:160], *([777] * 60)], 3)
    found.step(2)
    start, count = int(seen[0].prefix_lens[0]), int(seen[0].query_lens[0])
    assert start == 160 and 16 < count == Price(1e-2).most(64, 160) < 30


def test_the_option_goes_with_any_number_of_stages() -> None:
    assert Config.from_flat({"pp": 2, "enable-dynamic-chunking": True}).schedule.enable_dynamic_chunking
    assert Config.from_flat({"enable_dynamic_chunking": True}).schedule.enable_dynamic_chunking
    assert not Config.from_flat({"pp": 2}).schedule.enable_dynamic_chunking


def test_chunks_are_worth_as_many_tokens_with_nothing_before_them_as_they_cost() -> None:
    price = Price(1e-2)
    for count, start in ((1, 0), (40, 0), (16, 900), (7, 12_345)):
        whole = price.worth(np.array([float(count)]), np.array([float(start)]))
        assert whole + 1e-2 * whole**2 == pytest.approx(cost(1e-2, count, start))
        assert (whole == pytest.approx(count)) if not start else (whole > count)
    both = price.worth(np.array([16.0, 5.0]), np.array([900.0, 0.0]))
    assert both + 1e-2 * both**2 == pytest.approx(cost(1e-2, 16, 900) + cost(1e-2, 5, 0))
    assert Price().worth(np.array([3.0, 4.0]), np.array([9.0, 0.0])) == 7.0
    assert Price(1e-2).worth(np.array([]), np.array([])) == 0.0


def test_a_price_of_nothing_is_a_price_of_tokens() -> None:
    assert Price().most(0, 5) == 0 and Price(0.1).most(0, 5) == 0 and Price(0.1).most(3, 10**6) == 1
    assert math.isfinite(Price(1e-300).most(10**6, 10**6)) and Price(1e-300).most(10**6, 10**6) == 10**6
