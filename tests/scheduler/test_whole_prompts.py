"""Texts of models that do not generate: each is computed whole in one step, and is answered by its own result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.core.batch import Batch, StepOutput
from phloem.core.errors import OutOfMemory
from phloem.core.memory import Group
from phloem.core.messages import Chunk, Submit, Tokens, pack_ids
from phloem.core.request import SamplingParams
from phloem.kvcache.manager import CacheManager
from phloem.scheduler.scheduler import Scheduler, ScheduleSettings


class Sums:
    """A runner whose result for a text is the sum of its tokens and the place of its second half."""

    groups = (Group("state", 0, ()),)
    page_size = 16
    draft_room = graph_bytes = 0
    prepared: dict[str, Any] = {}

    def __init__(self, slots: int, starve: Callable[[Batch], bool] | None = None) -> None:
        self.max_slots, self.num_pages = slots, (2 * slots + 1,)
        self.batches: list[Batch] = []
        self._seconds: dict[int, int] = {}
        self._starve, self._closed = starve, -1

    def launch(self, batch: Batch) -> Any:
        runner = self

        class Pending:
            def done(self) -> bool:
                return True

            def result(self) -> StepOutput:
                if batch.epoch <= runner._closed or (runner._starve is not None and runner._starve(batch)):
                    runner._closed = max(runner._closed, batch.epoch)
                    runner._seconds.clear()
                    raise OutOfMemory("no memory")
                return runner.compute(batch)

        return Pending()

    def compute(self, batch: Batch) -> StepOutput:
        self.batches.append(batch)
        assert not batch.outputs.any() and not batch.prefix_lens.any()
        self._seconds |= {admission.slot: admission.second for admission in batch.admissions}
        output, at = StepOutput(batch.step, np.zeros(batch.num_rows, np.int32), np.zeros(0, np.int32)), 0
        for row, (slot, count) in enumerate(zip(batch.slots.tolist(), batch.query_lens.tolist(), strict=True)):
            total = float(batch.input_ids[at : at + count].sum())
            output.pooled[row] = np.array([total, self._seconds[slot]], np.float32)
            at += count
        return output

    def constrain(self, slot: int, follower: Any) -> None:
        raise AssertionError("nothing follows such a request")


def run(lengths: list[int], runner: Sums, budget: int, overlap: bool) -> dict[str, Chunk]:
    """Every request's last chunk."""
    found: dict[str, Chunk] = {}

    def send(message: Any) -> None:
        if isinstance(message, Tokens):
            assert not message.plain
            found.update({chunk.id: chunk for chunk in message.chunks})

    cache = CacheManager(runner.groups, runner.num_pages, runner.page_size, enabled=False)
    options = ScheduleSettings(
        runner.max_slots,
        100,
        1000,
        chunked_prefill_size=budget,
        overlap=overlap,
        debug_invariants=True,
        whole_prompts=True,
    )
    scheduler = Scheduler(runner, options, cache, send)  # type: ignore[arg-type]
    for at, length in enumerate(lengths):
        ids, params = pack_ids([at % 7 + 1] * length), SamplingParams(max_new_tokens=0)
        scheduler.receive(Submit(id=str(at), input_ids=ids, sampling=params, pooled=True, second=at % 3))
    for _ in range(10 * len(lengths) + 10):
        if not scheduler.busy:
            break
        scheduler.step()
    assert not scheduler.busy and scheduler.nothing_held
    return found


def right(found: dict[str, Chunk], lengths: list[int], lost: tuple[int, ...] = ()) -> None:
    assert len(found) == len(lengths)
    for at, length in enumerate(lengths):
        chunk = found[str(at)]
        assert chunk.finish is not None
        if at in lost:
            assert chunk.finish.status_code == 507 and "its tokens" in str(chunk.finish.message)
            continue
        assert chunk.finish.type == "length", chunk.finish
        assert np.frombuffer(chunk.pooled, "<f4").tolist() == [(at % 7 + 1) * length, at % 3]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(4, 70), st.integers(1, 9), st.booleans())
def test_every_text_is_computed_once_and_whole(lengths: list[int], budget: int, slots: int, overlap: bool) -> None:
    runner = Sums(slots)
    right(run(lengths, runner, budget, overlap), lengths)
    assert sum(batch.num_rows for batch in runner.batches) == len(lengths)
    most = max(budget, slots)
    assert all(batch.num_tokens <= most or batch.num_rows == 1 for batch in runner.batches)


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_are_filled(overlap: bool) -> None:
    runner = Sums(64)
    run([10] * 64, runner, 100, overlap)
    assert [batch.num_rows for batch in runner.batches] == [10] * 6 + [4]


@pytest.mark.parametrize("overlap", [False, True])
def test_short_texts_fill_what_a_long_one_leaves_and_do_not_keep_it_waiting(overlap: bool) -> None:
    runner = Sums(8)
    run([30, 90, 30, 30, 5], runner, 100, overlap)
    assert [sorted(batch.query_lens.tolist()) for batch in runner.batches] == [[5, 30, 30, 30], [90]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(30, 60), st.booleans())
def test_a_step_without_memory_is_run_again_in_smaller_ones(lengths: list[int], most: int, overlap: bool) -> None:
    runner = Sums(8, lambda batch: batch.num_tokens > most)
    right(run(lengths, runner, 200, overlap), lengths)


def test_a_text_that_does_not_fit_alone_ends_alone() -> None:
    runner = Sums(8, lambda batch: batch.num_tokens > 40)
    lengths = [10, 60, 20, 1]
    right(run(lengths, runner, 200, False), lengths, lost=(1,))
