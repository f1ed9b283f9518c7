"""The caches of several groups of ranks as one."""

from __future__ import annotations

import operator

import numpy as np
import pytest

from phloem.core.memory import Group
from phloem.kvcache import audit
from phloem.kvcache.lease import Lease
from phloem.kvcache.manager import CacheManager
from phloem.kvcache.parted import PartedCache

SIZE, PAGES = 4, 8
GROUPS = (Group("pages", 0, (0,)),)


def made() -> PartedCache:
    return PartedCache([CacheManager(GROUPS, (PAGES + 1,), SIZE) for _ in range(2)])


def entered(cache: PartedCache, part: int, tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> Lease:
    lease = cache.parts[part].match("", tokens, len(tokens) - 1, [np.zeros(PAGES, np.int32)])
    assert cache.reserve(lease, len(tokens))
    return lease


def check(cache: PartedCache, leases: list[Lease]) -> None:
    for part in cache.parts:
        audit.check(part, [lease for lease in leases if lease.part == part.number])


def test_what_one_part_has_the_other_does_not_find() -> None:
    cache, tokens = made(), np.arange(12, dtype=np.int32)
    lease = entered(cache, 1, tokens)
    cache.release(lease, tokens, 12)
    assert [part.probe("", tokens, 12).num_pages for part in cache.parts] == [0, 3]
    assert cache.probe("", tokens, 12).num_pages == 3
    assert entered(cache, 0, tokens).shared == 0 and entered(cache, 1, tokens).shared == 2


def test_numbers_are_those_of_all_parts_but_a_request_has_pages_of_one() -> None:
    cache, tokens = made(), np.arange(20, dtype=np.int32)
    leases = [entered(cache, 0, tokens), entered(cache, 1, tokens)]
    assert (cache.total_pages, cache.most_pages, cache.held_pages, cache.available_pages) == (16, 8, 10, 6)
    assert not cache.reserve(leases[0], 9 * SIZE) and cache.reserve(leases[0], 8 * SIZE)
    check(cache, leases)
    cache.reset(leases)
    assert cache.available_pages == 16


def test_a_page_for_each_is_given_by_all_parts_or_by_none() -> None:
    cache, tokens = made(), np.arange(20, dtype=np.int32)
    leases = [entered(cache, 0, tokens), entered(cache, 1, tokens)]
    assert cache.reserve_one_each(leases) and [lease.held for lease in leases] == [6, 6]
    assert cache.reserve(leases[1], 8 * SIZE)
    assert not cache.reserve_one_each(leases) and [lease.held for lease in leases] == [6, 8]
    check(cache, leases)


def test_a_moment_is_the_same_in_all_parts() -> None:
    cache, tokens = made(), np.arange(12, dtype=np.int32)
    lease = entered(cache, 1, tokens)
    cache.commit(lease, tokens, 12)
    moment = cache.mark()
    assert moment > 0 and all(part.mark() == moment for part in cache.parts)


@pytest.mark.parametrize("name", ["tree", "allocators", "windows", "states", "own", "evicted", "holds"])
def test_what_is_a_parts_own_the_whole_does_not_have(name: str) -> None:
    """One part's tree, asked for as if it were everybody's, would answer wrongly and in silence."""
    cache = made()
    assert name in vars(cache.parts[0])
    with pytest.raises(AttributeError, match=name):
        operator.attrgetter(name)(cache)


def test_the_whole_answers_by_what_all_parts_are() -> None:
    cache = made()
    part = cache.parts[0]
    assert (cache.groups, cache.page_size, cache.enabled, cache.paged) == (GROUPS, SIZE, True, 1)
    assert not cache.gives_back and not cache.has_states and cache.pages_for(9) == part.pages_for(9) == 3
    part.evicted[0] = 2
    assert cache.evicted_pages == 2 and [part.number for part in cache.parts] == [0, 1]
