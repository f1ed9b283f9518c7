"""Free pages: every page once, page 0 never, mistakes caught."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.kvcache.allocator import PageAllocator


def test_hands_out_every_page_but_the_scratch_page() -> None:
    pages = PageAllocator(9)
    first, second = pages.allocate(5), pages.allocate(3)
    assert first is not None and second is not None
    assert first.tolist() == [1, 2, 3, 4, 5]
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(1, 9))
    assert pages.available == 0 and pages.allocate(1) is None
    pages.free(second)
    assert pages.available == 3


def test_refusal_changes_nothing() -> None:
    pages = PageAllocator(5)
    assert pages.allocate(5) is None
    assert pages.available == 4
    assert pages.allocate(0) is not None


@pytest.mark.parametrize("wrong", [[0], [1, 1], [3], [-1]])
def test_wrong_pages_are_not_taken_back(wrong: list[int]) -> None:
    pages = PageAllocator(5)
    assert pages.allocate(2) is not None
    with pytest.raises(ValueError, match="page"):
        pages.free(np.array(wrong, dtype=np.int32))
    assert pages.available == 2
    pages.free(np.array([2, 1], dtype=np.int32))
    assert pages.available == 4


def test_needs_a_page_beside_scratch() -> None:
    with pytest.raises(ValueError, match="scratch"):
        PageAllocator(1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_any_order_of_calls_keeps_every_page_in_one_place(calls: list[tuple[bool, int]]) -> None:
    pages = PageAllocator(24)
    out: list[int] = []
    for take, count in calls:
        if take:
            got = pages.allocate(count)
            assert (got is None) == (count > 23 - len(out))
            out += [] if got is None else got.tolist()
        else:
            back, out = out[:count], out[count:]
            pages.free(np.array(back, dtype=np.int32))
        assert sorted([*out, *pages.free_pages().tolist()]) == list(range(1, 24))
