"""Which group of ranks a request is attended to by."""

from __future__ import annotations

from phloem.scheduler.attention_groups import GroupLoad, choose


def test_the_group_with_the_least_work_is_taken_and_of_equals_the_first() -> None:
    assert choose([GroupLoad(0, 1, 50, 0), GroupLoad(1, 1, 20, 0), GroupLoad(2, 1, 20, 0)], 10) == 1


def test_a_known_prefix_decides_until_its_group_has_far_more_to_do() -> None:
    near = [GroupLoad(0, 1, 100, 0), GroupLoad(1, 1, 110, 32)]
    assert choose(near, 40) == 1
    far = [GroupLoad(0, 1, 100, 0), GroupLoad(1, 1, 200, 32)]
    assert choose(far, 40) == 0


def test_the_longest_of_several_known_prefixes_counts() -> None:
    assert choose([GroupLoad(0, 1, 10, 16), GroupLoad(1, 1, 10, 32), GroupLoad(2, 1, 0, 0)], 40) == 1


def test_a_group_without_a_slot_or_without_pages_is_passed_over() -> None:
    assert choose([GroupLoad(0, 0, 0, 99), GroupLoad(1, 2, 500, 0)], 100) == 1
    assert choose([GroupLoad(0, 1, 0, 0, room=False), GroupLoad(1, 2, 500, 0)], 100) == 1
    assert choose([GroupLoad(0, 0, 0, 0), GroupLoad(1, 0, 0, 0)], 100) is None


def test_where_no_group_has_pages_one_is_named_for_it_to_wait_at() -> None:
    assert choose([GroupLoad(0, 1, 9, 0, room=False), GroupLoad(1, 1, 5, 0, room=False)], 100) == 1
