"""Which rows share pages, and when that is used: against a search by hand."""

from __future__ import annotations

import numpy as np

from phloem.attention._cascade import LEAST_TOKENS, Sharing, find, fixed_sizes, most_groups

PAGE = 16
CHEAP = Sharing(tile=16, programs=64, splits=(16, 8), token_bytes=1 << 20, part_bytes=4)


def rows_of(*starts: list[int], width: int = 40) -> np.ndarray:
    """A table whose rows begin with these pages and go on with pages of their own."""
    table = np.arange(1000, 1000 + len(starts) * width, dtype=np.int32).reshape(len(starts), width)
    for row, start in enumerate(starts):
        table[row, : len(start)] = start
    return table


def ones(count: int, value: int = 1) -> np.ndarray:
    return np.full(count, value, np.int32)


def test_rows_without_common_pages_are_in_no_group() -> None:
    assert find(rows_of([1], [2], [3]), ones(3), ones(3, 600), PAGE, 0, CHEAP) is None


def test_a_common_beginning_is_one_group_up_to_the_first_other_page() -> None:
    table = rows_of(list(range(1, 21)), [77], list(range(1, 21)), list(range(1, 21)))
    found = find(table, ones(4), np.array([600, 600, 500, 330], np.int32), PAGE, 0, CHEAP)
    assert found is not None
    assert found.lens.tolist() == [320, 0, 320, 320]
    assert found.group_start.tolist() == [0, 3] and found.members.tolist() == [0, 2, 3]
    assert found.positions.tolist() == [600, 500, 330]
    assert found.groups[0, :2].tolist() == [0, 320] and found.groups[0, 2] % 64 == 0
    assert found.places.tolist() == [0, -1, 1, 2]


def test_only_pages_that_every_row_had_before_the_step_are_shared() -> None:
    table = rows_of(list(range(1, 21)), list(range(1, 21)))
    found = find(table, np.array([1, 5], np.int32), np.array([300, 155], np.int32), PAGE, 0, CHEAP)
    assert found is not None and found.lens.tolist() == [144, 144]
    assert found.members.tolist() == [0, 1, 2, 3, 4, 5] and found.positions.tolist() == [300, 155, 156, 157, 158, 159]


def test_a_tree_is_cut_where_that_saves_most() -> None:
    system = list(range(1, 11))
    one, two = [*system, *range(50, 80)], [*system, *range(90, 120)]
    table = rows_of(one, two, one, two, one)
    found = find(table, ones(5), ones(5, 639), PAGE, 0, CHEAP)
    assert found is not None and found.lens.tolist() == [624] * 5  # the last page is not whole
    assert sorted(found.groups[:, 0].tolist()) == [0, 1] and found.group_start.tolist() == [0, 3, 5]
    # With little behind the common beginning it is one group.
    short_one, short_two = [*system, 50], [*system, 60]
    found = find(rows_of(short_one, short_two, short_one, short_two), ones(4), ones(4, 639), PAGE, 0, CHEAP)
    assert found is not None and found.lens.tolist() == [160] * 4


def test_nothing_is_shared_where_it_saves_too_little() -> None:
    table = rows_of(list(range(1, 21)), list(range(1, 21)))
    dear = Sharing(tile=16, programs=64, splits=(16, 8), token_bytes=4096, part_bytes=16_000)
    assert find(table, ones(2), ones(2, 400), PAGE, 0, dear) is None
    many = rows_of(*[list(range(1, 129))] * 16, width=140)
    assert find(many, ones(16), ones(16, 2100), PAGE, 0, dear) is not None


def test_long_rows_short_beginnings_and_left_pages_take_no_part() -> None:
    start = list(range(1, 21))
    table = rows_of(start, start, start, start)
    found = find(table, np.array([1, 17, 1, 1], np.int32), np.array([400, 400, LEAST_TOKENS - 1, 400], np.int32),
                 PAGE, 0, CHEAP)  # fmt: skip
    assert found is not None and found.lens.tolist() == [320, 0, 0, 320] and found.members.tolist() == [0, 19]
    left = table.copy()
    left[:, :3] = 0
    assert find(left, ones(4), ones(4, 400), PAGE, 0, CHEAP) is None


def test_behind_a_window_nothing_is_saved() -> None:
    start = list(range(1, 21))
    table = rows_of(start, start)
    assert find(table, ones(2), ones(2, 620), PAGE, 256, CHEAP) is None  # 320 shared tokens, 364 behind the window
    assert find(table, ones(2), ones(2, 400), PAGE, 256, CHEAP) is not None


def test_padded_arrays_fit_the_fixed_ones() -> None:
    start = list(range(1, 21))
    found = find(rows_of(start, start, [5], start), ones(4), ones(4, 400), PAGE, 0, CHEAP)
    assert found is not None
    for array, shape in zip(found.padded(10), fixed_sizes(10), strict=True):
        assert array.shape == shape and array.dtype == np.int32
    _, group_start, *_ = found.padded(10)
    assert group_start.tolist() == [0, *[3] * most_groups(10)]
