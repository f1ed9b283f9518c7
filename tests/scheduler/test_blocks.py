"""What a step computes of texts that are written block by block, as pure decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phloem.core.batch import Admission
from phloem.core.denoising import WHOLE, Denoising
from phloem.core.memory import Group
from phloem.core.messages import Submit, pack_ids
from phloem.core.request import SamplingParams
from phloem.engine.canvases.canvas import Canvas, Text
from phloem.kvcache.manager import CacheManager
from phloem.scheduler.blocks import spend_blocks
from phloem.scheduler.plan import Chunk, Means, Pace
from phloem.scheduler.state import Request, Slots

PAGE, BLOCK = 8, 4


def request(length: int, limit: int = 60, seq: int = 0) -> Request:
    found = Request(Submit(id=str(seq), input_ids=pack_ids(list(range(length))), sampling=SamplingParams()), 0.0)
    found.seq, found.limit = seq, limit
    return found


class Table:
    """Slots of requests of so many known and computed tokens."""

    def __init__(self, *texts: tuple[int, int], block: int = BLOCK) -> None:
        groups = (Group("pages", 0, (0,)),)
        self.cache = CacheManager(groups, (100,), PAGE)
        self.slots = Slots(8, 128, PAGE, groups, block)
        for seq, (length, computed) in enumerate(texts):
            one = request(length, seq=seq)
            lease = self.cache.match("", one.prompt, 0, self.slots.next_free())
            self.cache.reserve(lease, max(computed, 1))
            slot = self.slots.enter(one, lease, one.prompt)
            self.slots.computed[slot] = computed

    def spend(self, budget: int, waiting: tuple[Chunk, ...] = (), pages: int = 50) -> Any:
        means = Means(Pace(budget, budget, budget), budget, pages, 4, bool(waiting))
        return spend_blocks(self.slots, waiting, means)


def sizes(chunks: list[Chunk]) -> list[tuple[int, int]]:
    return [(chunk.count, chunk.canvas) for chunk in chunks]


def test_a_finished_block_is_computed_beside_the_next_canvas() -> None:
    assert sizes(Table((9, 8), (12, 8), (7, 4)).spend(64).chunks) == [(0, 4), (4, 4), (0, 4)]


def test_a_prompt_is_computed_in_whole_blocks_and_its_last_chunk_has_the_canvas_behind_it() -> None:
    assert sizes(Table((50, 0)).spend(22).chunks) == [(20, 0)]
    assert sizes(Table((50, 40)).spend(22).chunks) == [(8, 4)]
    assert sizes(Table((50, 0)).spend(52).chunks) == [(48, 4)]
    assert sizes(Table((50, 0)).spend(51).chunks) == [(48, 0)]


def test_canvases_come_before_prompts_and_those_before_who_waits() -> None:
    waiting = Chunk(request(6, seq=9), np.arange(6, dtype=np.int32), 0, pages=1)
    spent = Table((50, 0), (9, 8)).spend(24, (waiting,))
    assert [chunk.request.seq for chunk in spent.chunks] == [1, 0]
    assert sizes(spent.chunks) == [(0, 4), (12, 0)]
    assert sizes(spent.entries) == [(4, 4)]


def test_the_smallest_step_is_a_block_and_its_canvas_however_little_memory_there_is() -> None:
    assert sizes(Table((12, 8), (12, 8)).spend(1).chunks) == [(4, 4)]
    assert sizes(Table((50, 0)).spend(1).chunks) == [(4, 0)]


def test_who_lacks_a_page_is_named() -> None:
    spent = Table((9, 8), (16, 12)).spend(64, pages=1)
    assert [one.seq for one in spent.lacking] == [1]


def test_a_text_that_is_seen_whole_is_one_canvas_up_to_its_limit() -> None:
    assert sizes(Table((9, 0), (20, 0), block=WHOLE).spend(100).chunks) == [(0, 60)]
    assert sizes(Table((9, 0), (20, 0), block=WHOLE).spend(120).chunks) == [(0, 60), (0, 60)]


# What a pass accepts


def places(how: Denoising, confidence: list[float], number: int = 0) -> list[int]:
    return np.flatnonzero(how.accepted(np.array(confidence, np.float32), number)).tolist()


def test_a_pass_accepts_what_is_sure_and_its_quota_of_the_best() -> None:
    how = Denoising(8, 0, threshold=0.5)
    assert places(how, [0.6, 0.1, 0.7, 0.5]) == [0, 2]
    assert places(how, [0.2, 0.3, 0.3, 0.1]) == [1]
    assert places(Denoising(8, 0, threshold=0.5, steps=3), [0.6, 0.1, 0.2, 0.3]) == [0, 2, 3]
    assert places(Denoising(8, 0, threshold=0.5, steps=3), [0.6, 0.1, 0.2, 0.3], 2) == [0, 3]
    assert places(Denoising(8, 0, "low_confidence_static"), [0.96, 0.99]) == [1]
    assert places(Denoising(8, 0, "sequential", steps=4), [0.1, 0.2, 0.9]) == [0, 1]


@pytest.mark.parametrize("steps", range(1, 9))
def test_quotas_fill_a_block_in_as_many_passes_as_asked(steps: int) -> None:
    how = Denoising(8, 0, steps=steps)
    assert sum(how.quota(number) for number in range(steps)) == 8


def test_a_canvas_keeps_what_the_prompt_has_of_it_even_the_mask_token_itself() -> None:
    params = SamplingParams(max_new_tokens=3)
    text = Text.of(Admission(0, "a", params, 1, np.array([5, 6, 7, 8, 9, 2], np.int32), 6, (3,)))
    canvas = Canvas.over(text, 4, 4, Denoising(4, 2))
    assert canvas.ids.tolist() == [9, 2, 2, 2] and canvas.masked.tolist() == [False, False, True, True]
    assert text.done(canvas) == 0
    canvas.ids[2], canvas.masked[2] = 3, False
    assert text.done(canvas) == 3  # its end, though a place behind it is masked


def test_blocks_of_a_text_that_is_seen_whole_begin_with_the_answer() -> None:
    text = Text("a", [5, 6, 7, 8, 9], 3, 11, frozenset(), False)
    canvas = Canvas.over(text, 0, 11, Denoising(4, 2, whole=True))
    assert (canvas.first, canvas.until) == (5, 7)
    assert np.flatnonzero(canvas.masked).tolist() == [5, 6] and canvas.ids[7:].tolist() == [2] * 4
