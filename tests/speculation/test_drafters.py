"""Drafters: what they propose, when they are silent, what they keep, and what they cost."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from phloem.core.speculation import Wanted
from phloem.speculation.drafters import of_texts
from phloem.speculation.drafters._match import KEPT, after, agreement, index
from phloem.speculation.texts import Text


def text(tokens: list[int], prompt: int | None = None, namespace: str = "") -> Text:
    return Text("r", namespace, list(tokens), len(tokens) if prompt is None else prompt, easy=True)


def drafter(name: str = "suffix", **values: Any) -> Any:
    return of_texts(name)(Wanted(**values))


both = pytest.mark.parametrize("name", ["suffix", "ngram"])


@both
def test_what_followed_the_longest_earlier_place_is_drafted(name: str) -> None:
    own = text([1, 2, 3, 4, 50, 51, 7, 2, 3, 4, 60, 61, 9, 1, 2, 3, 4])
    draft = drafter(name).draft(own, 4)
    assert draft.tokens == [50, 51, 7, 2] and draft.matched == 4 and draft.source == "own" and draft.sure


@both
def test_of_places_as_long_the_latest_is_taken_and_it_is_not_sure(name: str) -> None:
    draft = drafter(name).draft(text([1, 2, 50, 1, 2, 60, 9, 1, 2]), 3)
    assert draft.tokens == [60, 9, 1] and draft.matched == 2 and not draft.sure


@both
def test_nothing_is_drafted_behind_what_never_stood_there(name: str) -> None:
    rng = random.Random(1)
    found = drafter(name)
    assert found.draft(text([]), 7) is None and found.draft(text([5]), 7) is None
    own = text([])
    for token in rng.sample(range(10_000), 500):
        own.tokens.append(token)
        assert found.draft(own, 7) is None
    assert drafter(name, min_match=3).draft(text([1, 2, 50, 9, 1, 2]), 7) is None


@both
def test_a_loop_is_drafted_on_beyond_the_end_of_the_text(name: str) -> None:
    assert drafter(name).draft(text([9, 1, 2, 3, 1, 2, 3]), 8).tokens == [1, 2, 3, 1, 2, 3, 1, 2]
    assert drafter(name).draft(text([5, 5, 5]), 4).tokens == [5, 5, 5, 5]
    assert after([1, 2], 1, 3) == []


@both
def test_lines_of_one_form_are_drafted_up_to_the_next_value(name: str) -> None:
    """Two records with values of their own, and the value of a third one."""
    answer = [75, 70, 71, 1, 2, 72, 73, 74, 3, 4, 75, 70, 71, 5, 6, 72, 73, 74, 7, 8, 75, 70, 71, 9, 10]
    own = text([*range(200, 220), *answer], 20)
    draft = drafter(name).draft(own, 23)
    assert (draft.tokens, draft.source, draft.sure) == ([72, 73, 74], "form", True)
    assert drafter(name).draft(own, 2).tokens == [72, 73]
    assert drafter(name).draft(text([*range(200, 220), *answer], 45), 23) is None, "a prompt's lines have no say"
    once = drafter(name).draft(text([*range(200, 220), *answer[:15]], 20), 23)
    assert once.source == "form" and once.tokens == [72, 73, 74, 3, 4, 75]


@both
def test_a_copy_keeps_its_place_among_many_that_look_alike(name: str) -> None:
    """More places of a key than are kept: the one that was followed is still found."""
    rng = random.Random(3)
    source = [token for number in range(40) for token in (7, 8, 9, 6, 100 + number, rng.randrange(200, 999))]
    own, found = text([*source, 1]), drafter(name)
    right = 0
    for token in source:
        own.tokens.append(token)
        draft = found.draft(own, 1)
        at = len(own.tokens) - len(source) - 1
        right += draft is not None and draft.tokens == source[at : at + 1]
    assert right >= len(source) - 12


def test_siblings_and_past_answers_are_drafted_from_within_a_namespace_alone() -> None:
    found = drafter()
    prompt = [1, 2, 3, 4]
    first, sibling = text([*prompt, 20, 21, 22, 23, 24], 4, "a"), text(prompt, 4, "a")
    found.draft(first, 4)
    draft = found.draft(sibling, 4)
    assert draft.tokens == [20, 21, 22, 23] and draft.source == "shared" and draft.matched == 4
    assert found.draft(text(prompt, 4, "b"), 4) is None
    assert drafter("ngram").draft(sibling, 4) is None
    found.ended(first)
    assert not first.index and found.draft(text([*prompt, 20], 4, "a"), 2).tokens == [21, 22]


def test_the_store_forgets_whole_answers_the_oldest_first() -> None:
    found, rng = drafter(capacity=400), random.Random(2)
    answers = [text([rng.randrange(10**6) for _ in range(100)], 10) for _ in range(9)]
    for answer in answers:
        found.ended(answer)
    assert found.store.tokens <= 400 and len(found.store) == 4
    places = [found.store.find(text(answer.tokens[:50], 10), 32) for answer in answers]
    assert [count for count, _, _ in places] == [0] * 5 + [32] * 4
    assert places[-1][1:] == (answers[-1], 49)
    assert found.draft(text(answers[-1].tokens[:50], 10), 3).tokens == answers[-1].tokens[50:53]
    none = drafter(capacity=0)
    none.ended(answers[0])
    assert none.store.tokens == 0


def test_an_index_keeps_the_latest_places_and_takes_each_token_once() -> None:
    own = text([1, 2] * 20)
    index(own)
    assert own.index[1, 2] == list(range(39 - 2 * KEPT, 39, 2)) and own.indexed == 39
    own.tokens.append(1)
    index(own)
    assert own.index[1, 2][-1] == 39 and own.indexed == 40
    assert agreement([9, 1, 2, 3], [7, 1, 2, 3, 4], 3, 32) == 3 and agreement([1, 2], [1, 2, 1, 2], 3, 1) == 1


@both
def test_a_draft_takes_microseconds(name: str) -> None:
    """Loosely: what a draft and a token's index take is far below a step. `phloem bench speculation` prints it."""
    rng = random.Random(4)
    base = [rng.randrange(3000) for _ in range(2000)]
    own, found = text([*base, *base[:100]]), drafter(name)
    found.draft(own, 7)
    best = 1.0
    for token in base[100:400]:
        own.tokens.append(token)
        start = time.perf_counter()
        assert found.draft(own, 7) is not None
        best = min(best, time.perf_counter() - start)
    assert best < 200e-6
