"""Who owns which page: hand-made cases, then random operations against the invariant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phloem.core.memory import Group
from phloem.kvcache import audit, report
from phloem.kvcache.manager import CacheManager, Lease

S = 2
FULL = [Group("pages", 0, (0,))]


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def lease_of(cache: CacheManager, tokens: np.ndarray, limit: int | None = None, namespace: str = "") -> Lease:
    limit = len(tokens) - 1 if limit is None else limit
    return cache.match(namespace, tokens, limit, (np.zeros(32, dtype=np.int32),))


def test_a_second_turn_hits_prompt_and_output() -> None:
    cache = CacheManager(FULL, [20], S)
    prompt, whole = ids(1, 2, 3), ids(1, 2, 3, 4, 5)
    lease = lease_of(cache, prompt)
    assert cache.reserve(lease, 3) and lease.held == 2 and lease.shared == 0
    cache.commit(lease, prompt, 3)
    assert lease.shared == 1 and cache.held_pages == 1
    assert cache.reserve(lease, 4)
    cache.release(lease, whole, 4)
    audit.check(cache, [])
    turn = lease_of(cache, ids(1, 2, 3, 4, 5, 6, 7))
    assert turn.shared == 2
    audit.check(cache, [turn])
    cache.release(turn, ids(), 0)
    assert cache.available_pages == cache.total_pages == 19


def test_equal_pages_computed_twice_are_merged() -> None:
    cache = CacheManager(FULL, [20], S)
    tokens = ids(1, 2, 3, 4, 5)
    one, two = lease_of(cache, tokens), lease_of(cache, tokens)
    assert cache.reserve(one, 5) and cache.reserve(two, 5)
    free = cache.free_pages
    cache.commit(one, tokens, 5)
    cache.commit(two, tokens, 5)
    assert cache.free_pages == free + 2
    assert one.tables[0][:2].tolist() == two.tables[0][:2].tolist() and one.tables[0][2] != two.tables[0][2]
    audit.check(cache, [one, two])


def test_reserve_evicts_but_only_what_nobody_uses() -> None:
    cache = CacheManager(FULL, [5], S)
    old = lease_of(cache, ids(1, 2, 3, 4))
    assert cache.reserve(old, 4)
    cache.release(old, ids(1, 2, 3, 4), 4)
    user = lease_of(cache, ids(1, 2, 9))
    assert user.shared == 1 and cache.available_pages == 3
    assert not cache.reserve(user, 9)
    assert user.held == 1 and cache.evicted_pages == 0
    assert cache.reserve(user, 8) and cache.evicted_pages == 1
    audit.check(cache, [user])


def test_a_failed_request_leaves_nothing_behind_that_only_it_had() -> None:
    cache = CacheManager(FULL, [20], S)
    good = lease_of(cache, ids(1, 2, 3))
    assert cache.reserve(good, 2)
    cache.release(good, ids(1, 2), 2)
    bad = lease_of(cache, ids(1, 2, 7, 8, 9))
    assert bad.shared == 1 and cache.reserve(bad, 5)
    cache.commit(bad, ids(1, 2, 7, 8, 9), 5)
    held = lease_of(cache, ids(1, 2, 3))
    cache.release(bad, ids(), 5, keep=False)
    assert cache.probe("", ids(1, 2, 7, 8), 4).num_pages == 1
    audit.check(cache, [held])


def test_disabled_shares_nothing() -> None:
    cache = CacheManager(FULL, [20], S, enabled=False)
    tokens = ids(1, 2, 3, 4)
    lease = lease_of(cache, tokens)
    assert cache.reserve(lease, 4)
    cache.commit(lease, tokens, 4)
    cache.release(lease, tokens, 4)
    assert lease_of(cache, tokens).shared == 0 and cache.probe("", tokens, 4).num_pages == 0
    assert cache.free_pages == 19


def test_unlimited_locks_on_an_empty_tree_and_reset() -> None:
    cache = CacheManager(FULL, [20], S)
    lease = lease_of(cache, ids(1, 2, 3, 4, 5))
    assert cache.reserve(lease, 5)
    cache.commit(lease, ids(1, 2, 3, 4, 5), 5)
    cache.reset([lease])
    audit.check(cache, [lease])
    assert cache.free_pages == 19 and lease.held == 0 and not lease.tables[0].any()


def test_check_notices_a_page_in_two_places() -> None:
    cache = CacheManager(FULL, [20], S)
    one, two = lease_of(cache, ids(1, 2)), lease_of(cache, ids(3, 4))
    assert cache.reserve(one, 2) and cache.reserve(two, 2)
    audit.check(cache, [one, two])
    two.tables[0][0] = one.tables[0][0]
    with pytest.raises(AssertionError, match="several"):
        audit.check(cache, [one, two])
    cache.own[0] += 1
    with pytest.raises(AssertionError, match="total"):
        audit.check(cache, [one, two])


def test_check_notices_a_lost_lock() -> None:
    cache = CacheManager(FULL, [20], S)
    lease = lease_of(cache, ids(1, 2, 3))
    assert cache.reserve(lease, 3)
    cache.commit(lease, ids(1, 2, 3), 3)
    with pytest.raises(AssertionError):
        audit.check(cache, [])


def test_snapshot_counts_in_tokens() -> None:
    cache = CacheManager(FULL, [20], S)
    lease = lease_of(cache, ids(1, 2, 3, 4, 5))
    assert cache.reserve(lease, 5)
    cache.commit(lease, ids(1, 2, 3, 4, 5), 5)
    view = report.snapshot(cache)
    assert view["cached_tokens"] == 4 and view["held_tokens"] == 2 and view["total_tokens"] == 38
    assert view["nodes"][0]["locks"] == 1 and view["evictable_tokens"] == 0


class Requests(RuleBasedStateMachine):
    """Random lives of random requests in a small pool; the store remembers what each page must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = CacheManager(FULL, [18], S, eviction="lru")
        self.running: list[tuple[Lease, list[int], int]] = []  # lease, tokens, computed
        self.store = np.full((18, S), -1, dtype=np.int64)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from(["", "x"]))
    def admit(self, tokens: list[int], salt: str) -> None:
        if len(self.running) == 4:
            return
        # A namespace has KV of its own: its tokens are other numbers in the store.
        array = np.array(tokens, dtype=np.int32) + (10 if salt else 0)
        probed = self.cache.probe(salt, array, len(tokens) - 1).num_pages
        lease = lease_of(self.cache, array, namespace=salt)
        assert lease.shared == probed
        self.running.append((lease, array.tolist(), lease.shared * S))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3), count=st.integers(1, 6))
    def compute(self, which: int, count: int) -> None:
        at = which % len(self.running)
        lease, tokens, computed = self.running[at]
        end = min(computed + count, len(tokens))
        if not self.cache.reserve(lease, end):
            assert -(-end // S) - lease.held > self.cache.available_pages
            return
        for position in range(computed, end):
            self.store[lease.tables[0][position // S], position % S] = tokens[position]
        self.cache.commit(lease, np.array(tokens, dtype=np.int32), end)
        self.running[at] = (lease, tokens, end)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3), token=st.integers(0, 1))
    def sample(self, which: int, token: int) -> None:
        lease, tokens, computed = self.running[which % len(self.running)]
        if computed == len(tokens) < 40:
            tokens.append(token + (10 if lease.namespace else 0))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3), keep=st.booleans())
    def end(self, which: int, keep: bool) -> None:
        lease, tokens, computed = self.running.pop(which % len(self.running))
        self.cache.release(lease, np.array(tokens, dtype=np.int32), computed, keep)

    @invariant()
    def pages_add_up_and_hold_what_they_should(self) -> None:
        audit.check(self.cache, [lease for lease, _, _ in self.running])
        for lease, tokens, computed in self.running:
            held = [int(self.store[lease.tables[0][at // S], at % S]) for at in range(computed)]
            assert held == tokens[:computed]


Requests.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestRequests = Requests.TestCase
