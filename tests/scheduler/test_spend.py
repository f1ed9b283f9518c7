"""What a step spends, against a decision made one token and one page at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.core.memory import Paged, groups_of
from phloem.core.messages import Submit, pack_ids
from phloem.core.request import SamplingParams
from phloem.scheduler.plan import HORIZON, KEPT, LONG, Chunk, Means, Pace, spend
from phloem.scheduler.state import Request, Slots

S = 4


@dataclass
class Naive:
    """The same decision by counting."""

    slots: Slots
    wants: list[Chunk]
    means: Means
    pages: int = 0
    long: int = 0
    decodes: list[int] = field(default_factory=list)
    chunks: dict[int, int] = field(default_factory=dict)  # slot -> tokens
    entries: list[tuple[str, int]] = field(default_factory=list)
    lacking: set[int] = field(default_factory=set)

    def decide(self) -> Naive:
        slots, means, self.pages = self.slots, self.means, self.means.pages
        covered = {slot: int(slots.covered[slot]) for slot in range(slots.count)}
        ready = [slot for slot in slots.active().tolist() if slot not in means.resting]
        todo = {slot: int(slots.length[slot] - slots.computed[slot]) for slot in ready}
        front = sorted((slot for slot in ready if todo[slot] == 1), key=lambda slot: slots.at(slot).place)
        self.decodes = front[: means.most]
        for slot in self.decodes:
            if not self._position(slot, int(slots.computed[slot]), covered):
                self.lacking.add(slot)
        if self.lacking:
            return self
        left = min(means.pace.budget, means.most) - len(self.decodes)
        left = min(max(left, 0), means.pace.mixed) if self.decodes else left
        prompts = sorted((slot for slot in ready if todo[slot] > 1), key=lambda slot: slots.at(slot).place)
        self.long = LONG * left
        long = [slot for slot in prompts if todo[slot] > self.long]
        both = bool(long) and len(long) < len(prompts)
        kept = left // KEPT if prompts and ((means.entries and means.queued) or both) else 0
        for turn in (prompts, [slot for slot in prompts if slot not in long]):
            if turn is not prompts:
                if not any(slot in long for slot in self.chunks):
                    break
                kept = 0  # what long prompts leave goes to shorter ones behind them
            for slot in turn:
                if slot in self.chunks:
                    continue
                if left <= kept:
                    break
                count = self._tokens(slot, 0, todo[slot], left - kept, covered)
                if not count:
                    self.lacking = {slot}
                    return self
                self.chunks[slot], left = count, left - count
        if means.entries and means.queued:
            left = self._let_in(left, covered)
        if self.chunks:
            slot, count = next(iter(self.chunks.items()))
            self.chunks[slot] += self._tokens(slot, count, todo[slot], left, covered)
        return self

    def _position(self, slot: int, position: int, covered: dict[int, int]) -> bool:
        """A page for this position, where it has none."""
        if position < covered[slot]:
            return True
        if self.pages <= 0:
            return False
        self.pages -= 1
        covered[slot] += S
        return True

    def _tokens(self, slot: int, done: int, todo: int, left: int, covered: dict[int, int]) -> int:
        begin = count = done
        while count < todo and count - begin < left:
            if not self._position(slot, int(self.slots.computed[slot]) + count, covered):
                break
            count += 1
        return count - begin

    def _let_in(self, left: int, covered: dict[int, int]) -> int:
        slots, means, first = self.slots, self.means, left
        free, begun, empty = means.entries, bool(self.chunks), slots.num_running == 0
        promised, growth = 0, 0
        for slot in slots.active().tolist():
            promised += sum(at >= covered[slot] for at in range(0, int(slots.length[slot]), S))
            growth += min(int(slots.limit[slot] - slots.length[slot]), HORIZON)
        promised += math.ceil(int(growth * means.share) / S)
        beside = all(int(slots.length[s] - slots.computed[s]) > self.long for s in self.chunks)
        computing = [slots.at(slot).known[: (slots.lease(slot).shared + 1) * S].tolist() for slot in self.chunks]
        for want in self.wants:
            if left <= 0 or not free or (not begun and first - left >= means.pace.worthwhile):
                break
            rest = len(want.known) - want.start
            if begun and rest > left and not (beside and rest <= self.long):
                continue
            page = want.known[: want.start + S].tolist()
            if want.sharable and any(page == other for other in computing):
                continue
            if not empty and want.pages > self.pages - promised:
                break
            self.entries.append((want.request.id, min(rest, left)))
            computing.append(page)
            left, free, empty = left - min(rest, left), free - 1, False
            self.pages -= want.pages
            promised += math.ceil(int(want.growth * means.share) / S)
        return left


def request(name: str, known: list[int], key: float, room: int) -> Request:
    submit = Submit(id=name, input_ids=pack_ids(known), sampling=SamplingParams(max_new_tokens=room))
    made = Request(submit, 0.0)
    made.key, made.seq, made.limit = key, int(name[1:]), len(known) + room
    return made


# Two prompts, and beginnings of them: many share pages.
tokens = st.builds(lambda kind, count: [11] * 6 + [kind] * count, st.sampled_from([11, 12]), st.integers(1, 40))


@st.composite
def tables(draw: Any) -> tuple[Slots, list[Chunk], Means]:
    slots = Slots(6, 400, S, groups_of((Paged(1, 1, 1),)))
    for index in range(draw(st.integers(0, 5))):
        known = draw(tokens)
        made = request(f"r{index}", known, draw(st.integers(0, 3)), draw(st.integers(1, 40)))
        computed = draw(st.sampled_from([len(known) - 1, len(known) - 1, 0, 4, (len(known) - 1) // 2]))
        held = math.ceil(computed / S) + draw(st.integers(0, 2))
        lease: Any = SimpleNamespace(shared=0, held=held, part=0)
        slots.enter(made, lease, made.prompt)
        slots.computed[made.slot] = computed
        lease.shared = computed // S
    if slots.num_running and draw(st.booleans()) and draw(st.booleans()):
        slots.retire(0)
    wants: list[Chunk] = []
    for index in range(draw(st.integers(0, 8))):
        known = draw(tokens)
        made = request(f"w{index}", known, 0.0, draw(st.integers(1, 40)))
        cached = draw(st.sampled_from([0, 0, 1, (len(known) - 1) // S]))
        pages = math.ceil(len(known) / S) - cached
        sharable = (cached + 1) * S <= len(known) - 1
        wants.append(Chunk(made, made.prompt, cached * S, 0, pages, min(made.limit - len(known), HORIZON), sharable))
    budget = draw(st.sampled_from([1, 7, 30, 60, 100]))
    means = Means(
        pace=Pace(budget, draw(st.sampled_from([1, budget])), draw(st.sampled_from([budget // 2 + 1, budget]))),
        most=draw(st.sampled_from([2, 20, 100, 100])),
        pages=draw(st.integers(0, 40)),
        entries=draw(st.sampled_from([0, 1, slots.num_free, slots.num_free])),
        queued=bool(wants),
        share=draw(st.sampled_from([0.0, 0.3, 1.0])),
        resting=set(draw(st.lists(st.integers(0, 5), max_size=1))),
    )
    return slots, wants, means


def arrays(slots: Slots) -> list[Any]:
    return [array.tolist() for array in (slots.computed, slots.length, slots.limit, slots.covered, slots.next_token)]


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(tables())
def test_it_decides_as_one_who_counts_tokens_and_pages_one_by_one(case: tuple[Slots, list[Chunk], Means]) -> None:
    slots, wants, means = case
    before = arrays(slots)
    naive = Naive(slots, wants, means).decide()
    spent = spend(slots, iter(wants), means)
    assert arrays(slots) == before and slots.num_running == sum(request is not None for request in slots.requests)
    assert {item.slot for item in spent.lacking} == naive.lacking
    if naive.lacking:
        return
    assert sorted(spent.decodes.tolist()) == sorted(naive.decodes)
    assert [(chunk.request.slot, chunk.count) for chunk in spent.chunks] == list(naive.chunks.items())
    assert [(chunk.request.id, chunk.count) for chunk in spent.entries] == naive.entries
    for chunk in spent.chunks:
        assert chunk.start == slots.computed[chunk.request.slot]


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(tables(), st.integers(1, 12))
def test_room_for_drafts_takes_nothing_from_anyone(case: tuple[Slots, list[Chunk], Means], most: int) -> None:
    slots, wants, means = case
    plain = spend(slots, map(replace, wants), means)
    pace = Pace(means.pace.budget, means.pace.mixed, means.pace.worthwhile, most)
    fields = {name: getattr(means, name) for name in Means.__slots__}
    spent = spend(slots, iter(wants), Means(**{**fields, "pace": pace}))
    assert spent.decodes.tolist() == plain.decodes.tolist() and spent.lacking == plain.lacking
    assert [(chunk.start, chunk.count) for chunk in spent.chunks + spent.entries] == [
        (chunk.start, chunk.count) for chunk in plain.chunks + plain.entries
    ]
    if spent.room is None:
        return
    at, room = spent.decodes, spent.room
    assert len(room) == len(at) and room.dtype == np.int32 and 0 < room.max() <= most and room.min() >= 0
    assert (slots.length[at] + 1 + room <= np.maximum(slots.limit[at], slots.length[at] + 1)).all()
    used = len(at) + sum(chunk.count for chunk in spent.chunks + spent.entries)
    assert used + room.sum() <= min(means.pace.budget, means.most)
    pages = sum(
        max(0, math.ceil((int(slots.computed[slot]) + 1 + more - int(slots.covered[slot])) / S))
        for slot, more in zip(at.tolist(), room.tolist(), strict=True)
    )
    for chunk in spent.chunks:
        pages += max(0, math.ceil((chunk.start + chunk.count - int(slots.covered[chunk.request.slot])) / S))
    entering = sum(want.pages for want in wants if want.request in [chunk.request for chunk in spent.entries])
    assert pages + entering <= means.pages or not room.sum()


def prompt(slots: Slots, name: str, count: int, key: float) -> Request:
    """A running request none of whose prompt is computed."""
    made = request(name, [int(name[1:]) + 20] * count, key, 5)
    lease: Any = SimpleNamespace(shared=0, held=0, part=0)
    slots.enter(made, lease, made.prompt)
    return made


def want(name: str, count: int) -> Chunk:
    made = request(name, [int(name[1:]) + 60] * count, 9.0, 5)
    return Chunk(made, made.prompt, 0, 0, math.ceil(count / S), 5, True)


def counts(chunks: list[Chunk]) -> list[tuple[str, int]]:
    return [(chunk.request.id, chunk.count) for chunk in chunks]


def test_a_long_prompt_leaves_a_part_of_its_steps_to_shorter_ones() -> None:
    slots = Slots(6, 4000, S, groups_of((Paged(1, 1, 1),)))
    prompt(slots, "r1", 400, 0.0)
    alone = Means(Pace(16, 16, 16), 16, 500, 5, True)
    assert counts(spend(slots, iter([]), alone).chunks) == [("r1", 16)]
    # A second long prompt waits; one that needs up to LONG steps of its own is begun beside it; short ones end in it.
    spent = spend(slots, iter([want("w1", 200), want("w2", 16 * LONG)]), alone)
    assert (counts(spent.chunks), counts(spent.entries)) == ([("r1", 12)], [("w2", 4)])
    spent = spend(slots, iter([want("w1", 200), want("w2", 3), want("w3", 40)]), alone)
    assert counts(spent.entries) == [("w2", 3), ("w3", 1)]


def test_a_shorter_prompt_that_has_begun_goes_on_beside_a_long_one() -> None:
    slots = Slots(6, 4000, S, groups_of((Paged(1, 1, 1),)))
    prompt(slots, "r1", 400, 0.0)
    prompt(slots, "r2", 50, 1.0)
    spent = spend(slots, iter([]), Means(Pace(16, 16, 16), 16, 500, 0, False))
    assert counts(spent.chunks) == [("r1", 12), ("r2", 4)]
    # Whoever stands in front of a long one takes what it needs.
    prompt(slots, "r3", 10, -1.0)
    spent = spend(slots, iter([]), Means(Pace(16, 16, 16), 16, 500, 0, False))
    assert counts(spent.chunks) == [("r3", 10), ("r1", 2), ("r2", 4)]


def test_it_looks_at_no_more_waiting_requests_than_it_must() -> None:
    slots = Slots(6, 400, S, groups_of((Paged(1, 1, 1),)))
    looked: list[int] = []

    def waiting() -> Iterator[Chunk]:
        for index in range(50):
            looked.append(index)
            made = request(f"w{index}", [20 + index] * 10, 0.0, 5)
            yield Chunk(made, made.prompt, 0, 0, 3, 5, True)

    means = Means(Pace(20, 20, 20), 20, 100, 6, True)
    assert len(spend(slots, waiting(), means).entries) == 2 and looked == [0, 1]
