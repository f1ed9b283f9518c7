"""Groups of memory: random lives of requests against a brute force, then hand-made cases of windows and states."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phloem.core.memory import Group
from phloem.kvcache import audit, report, undo
from phloem.kvcache.manager import CacheManager, Given, Lease
from phloem.kvcache.namespaces import namespace
from phloem.kvcache.node import hashes, path_to

FULL, STATE = Group("pages", 0, (0,)), Group("state", 0, (9,))
NOTHING = np.empty(0, np.int32)
ROWS = 48  # pages of a table row


def window(tokens: int) -> Group:
    return Group("pages", tokens, (tokens,))


KINDS: dict[str, list[Group]] = {
    "full": [FULL],
    "full and window": [FULL, window(5)],
    "two windows": [FULL, window(7), window(3)],
    "full and states": [FULL, STATE],
    "all": [FULL, window(6), STATE],
    "window alone": [window(5)],
    "window and states": [window(4), STATE],
    "states alone": [STATE],
}


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def manager(groups: list[Group], pages: int, size: int, slots: int = 14, small: int = 0) -> CacheManager:
    """`small`: pages of windows; 0: as many as of the others."""
    count = [slots if group.kind == "state" else (small or pages) if group.window else pages for group in groups]
    return CacheManager(groups, count, size, state_interval=3 * size)


def rows(cache: CacheManager) -> tuple[np.ndarray, ...]:
    return tuple(np.zeros(2 if group.kind == "state" else ROWS, dtype=np.int32) for group in cache.groups)


def available(cache: CacheManager) -> list[int]:
    return [account["free"] + account["evictable"] for account in report.group_accounts(cache)]


def brute_match(cache: CacheManager, name: str, tokens: list[int], limit: int) -> int:
    """The longest prefix in pages by trying every one, from all that is alive in the tree."""
    size = cache.page_size
    alive: dict[tuple[int, ...], tuple[bool, ...]] = {(): tuple(True for _ in cache.groups)}
    for node in cache.tree.nodes():
        path = path_to(node)
        root = path[0].parent
        assert root is not None
        if root.name != name:
            continue
        whole = np.frombuffer(b"".join(at.data for at in path), np.int32).tolist()
        start = len(whole) // size - node.count
        for page in range(node.count):
            last = page == node.count - 1
            pages = ([True] if cache.tree.whole else []) + [bool(each[page]) for each in node.windows]
            state = [last and node.state != 0] if cache.states is not None else []
            alive[tuple(whole[: (start + page + 1) * size])] = tuple(pages + state)
    best = 0
    for border in range(1, min(limit, len(tokens)) // size + 1):
        if tuple(tokens[: border * size]) not in alive:
            break
        good = True
        for number, group in enumerate(cache.groups):
            if group.kind == "state":
                good &= alive[tuple(tokens[: border * size])][number]
            else:
                read = range(group.first_needed(border * size), border * size)
                good &= all(alive[tuple(tokens[: (at // size + 1) * size])][number] for at in read)
        best = border if good else best
    return best


@dataclass(eq=False)
class Running:
    lease: Lease
    tokens: list[int]
    computed: int


@dataclass(eq=False)
class Step:
    request: Running
    mark: int
    before: int
    end: int
    given: list[Given] = field(default_factory=list)
    undo: list[tuple[np.ndarray, tuple[int, ...], int]] = field(default_factory=list)  # what it wrote over


class World:
    """Requests, a store that remembers what each page and slot holds, and steps of which some are in flight."""

    def __init__(self, groups: list[Group], pages: int, size: int, slots: int, small: int) -> None:
        self.cache = manager(groups, pages, size, slots, small)
        self.size = size
        self.store = [np.full((allocator.num_pages, size), -1, np.int64) for allocator in self.cache.allocators]
        self.running: list[Running] = []
        self.flight: list[Step] = []

    def meaning(self, request: Running, position: int) -> int:
        """What a position holds depends on all tokens up to it, and on the namespace."""
        return hash((request.lease.namespace, *request.tokens[: position + 1])) & 0xFFFFFFFF

    def admit(self, name: str, tokens: list[int]) -> None:
        want = brute_match(self.cache, name, tokens, len(tokens) - 1)
        assert self.cache.probe(name, ids(tokens), len(tokens) - 1).num_pages == want
        lease = self.cache.match(name, ids(tokens), len(tokens) - 1, rows(self.cache))
        assert lease.shared == lease.held == want
        self.running.append(Running(lease, tokens, want * self.size))

    def launch(self, request: Running, count: int, give: bool, sure: bool = True) -> bool:
        """One step of a request; False where memory is short, and then too little could be had."""
        cache, lease, start = self.cache, request.lease, request.computed
        count = cache.cut(lease, ids(request.tokens), start, min(count, len(request.tokens) - start))
        if count <= 0:
            return False
        end = start + count
        missing, room = max(0, -(-end // self.size) - lease.held), available(cache)
        need = [max(0, 2 - len(lease.own)) if group.kind == "state" else missing for group in cache.groups]
        got = cache.reserve(lease, end)
        assert got == all(want <= there for want, there in zip(need, room, strict=True))
        if not got:
            return False
        self.check_reads(request)
        step = Step(request, cache.mark(), start, end)
        for number, group in enumerate(cache.groups):
            if group.kind == "state":
                self.write(step, number, (int(lease.tables[number][1]), 0), self.meaning(request, end - 1))
                continue
            for at in range(start, end):
                place = int(lease.tables[number][at // self.size]), at % self.size
                assert place[0] > 0
                self.write(step, number, place, self.meaning(request, at))
        cache.turn(lease, end if sure else -1)
        if give:
            step.given.append(cache.given(lease))
            cache.commit(lease, ids(request.tokens), end)
        request.computed = end
        self.flight.append(step)
        return True

    def write(self, step: Step, number: int, place: tuple[int, int], value: int) -> None:
        step.undo.append((self.store[number], place, int(self.store[number][place])))
        self.store[number][place] = value

    def finish(self) -> None:
        """The oldest step is committed."""
        step = self.flight.pop(0)
        request = step.request
        if request not in self.running:
            return
        self.cache.behind(request.lease, step.end)
        if any(other.request is request for other in self.flight):
            return
        for number, group in enumerate(self.cache.groups):
            if group.window:  # what is still held is the window, what comes after it, and a page at either border
                held = int((request.lease.tables[number] != 0).sum())
                ahead = request.lease.held * self.size - step.end
                assert held * self.size <= group.window - 1 + ahead + 2 * self.size

    def roll_back(self) -> None:
        """The oldest step has failed: it and those behind it never were."""
        first = self.flight[0]
        for step in reversed(self.flight):
            for store, place, value in reversed(step.undo):
                store[place] = value
        for store, place, _ in first.undo:
            store[place] = -2  # it may have written anything
        before: dict[int, int] = {}
        for step in self.flight:
            before.setdefault(id(step.request), step.before)
        leases = [(request.lease, (len(request.tokens) - 1) // self.size) for request in self.running]
        undo.roll_back(self.cache, first.mark, leases, [item for step in self.flight for item in step.given])
        self.flight = []
        for request in self.running:
            lease, was = request.lease, before.get(id(request), request.computed)
            request.computed = max(lease.shared * self.size, min(was, lease.held * self.size))

    def end(self, request: Running, keep: bool) -> None:
        self.running.remove(request)
        tokens = ids(request.tokens) if keep else NOTHING
        self.cache.release(request.lease, tokens, request.computed, keep)
        assert not any(table.any() for table in request.lease.tables)

    def check_reads(self, request: Running) -> None:
        """All that the next step reads is there, and is what it must be."""
        lease, at = request.lease, request.computed
        for number, group in enumerate(self.cache.groups):
            row = lease.tables[number]
            if group.kind == "state":
                assert (row[0] != 0) == (at > 0)
                assert at == 0 or self.store[number][row[0], 0] == self.meaning(request, at - 1)
                continue
            for position in range(group.first_needed(at), at):
                page = int(row[position // self.size])
                assert page > 0 and self.store[number][page, position % self.size] == self.meaning(request, position)

    def check(self) -> None:
        audit.check(self.cache, [request.lease for request in self.running])
        for request in self.running:
            self.check_reads(request)


class Lives(RuleBasedStateMachine):
    """Any order of admissions, steps, ends, failures and locks of others, in pools that are too small."""

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        size=st.sampled_from([1, 2, 4]),
        pages=st.sampled_from([14, 40]),
        small=st.sampled_from([0, 12]),
        slots=st.sampled_from([10, 30]),
    )
    def begin(self, kind: str, size: int, pages: int, small: int, slots: int) -> None:
        self.world = World(KINDS[kind], pages, size, slots, small)
        self.holds: list[object] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24), salt=st.sampled_from(["", "", "x"]))
    def admit(self, tokens: list[int], salt: str) -> None:
        if len(self.world.running) < 4:
            self.world.admit(salt, list(tokens))

    @precondition(lambda self: self.world.running)
    @rule(which=st.integers(0, 3), count=st.integers(1, 12), give=st.booleans(), sure=st.booleans())
    def launch(self, which: int, count: int, give: bool, sure: bool) -> None:
        world = self.world
        if len(world.flight) < 3:
            world.launch(world.running[which % len(world.running)], count, give, sure)

    @precondition(lambda self: self.world.flight)
    @rule()
    def finish(self) -> None:
        self.world.finish()

    @precondition(lambda self: self.world.flight and not self.holds)
    @rule()
    def fail(self) -> None:
        self.world.roll_back()

    @precondition(lambda self: self.world.running)
    @rule(which=st.integers(0, 3), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def sample(self, which: int, tokens: list[int]) -> None:
        request = self.world.running[which % len(self.world.running)]
        if len(request.tokens) < 40 and request.computed == len(request.tokens):
            request.tokens += tokens

    @precondition(lambda self: self.world.running)
    @rule(which=st.integers(0, 3), keep=st.sampled_from([True, True, True, False]))
    def end(self, which: int, keep: bool) -> None:
        world = self.world
        world.end(world.running[which % len(world.running)], keep)

    @rule(which=st.integers(0, 20))
    def hold(self, which: int) -> None:
        nodes = list(self.world.cache.tree.nodes())
        if nodes and len(self.holds) < 2 and not self.world.flight:
            self.holds.append(self.world.cache.hold(nodes[which % len(nodes)]))

    @precondition(lambda self: self.holds)
    @rule()
    def drop(self) -> None:
        self.world.cache.drop(self.holds.pop())  # type: ignore[arg-type]

    @invariant()
    def all_adds_up(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for request in list(self.world.running):
            self.world.end(request, True)
        for hold in self.holds:
            self.world.cache.drop(hold)  # type: ignore[arg-type]
        self.world.check()
        for account in report.group_accounts(self.world.cache):
            assert account["held"] == 0 and account["free"] + account["evictable"] == account["total"]


Lives.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLives = pytest.mark.slow(Lives.TestCase)


def run(cache: CacheManager, tokens: list[int], chunk: int = 1 << 20) -> tuple[int, int]:
    """A whole life of a request: pages reused, and steps taken."""
    lease = cache.match("", ids(tokens), len(tokens) - 1, rows_for(cache, len(tokens)))
    reused, computed, steps = lease.shared, lease.shared * cache.page_size, 0
    while computed < len(tokens):
        count = cache.cut(lease, ids(tokens), computed, min(chunk, len(tokens) - computed))
        assert 0 < count <= chunk
        computed, steps = computed + count, steps + 1
        assert cache.reserve(lease, computed)
        cache.turn(lease, computed)
        cache.commit(lease, ids(tokens), computed)
        cache.behind(lease, computed)
    audit.check(cache, [lease])
    cache.release(lease, ids(tokens), computed)
    return reused, steps


def rows_for(cache: CacheManager, tokens: int) -> tuple[np.ndarray, ...]:
    width = -(-tokens // cache.page_size) + 1
    return tuple(np.zeros(2 if group.kind == "state" else width, dtype=np.int32) for group in cache.groups)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("kind", ["full", "full and window", "full and states", "all", "states alone"])
def test_a_prompt_of_any_length_is_reused_up_to_its_last_page_but_one_token(kind: str, size: int) -> None:
    for length in range(1, 201):
        cache = CacheManager(KINDS[kind], [230 for _ in KINDS[kind]], size)
        tokens = list(range(length))
        assert run(cache, tokens)[0] == 0
        assert run(cache, tokens)[0] == (length - 1) // size
        audit.check(cache, [])


@pytest.mark.parametrize("chunk", [5, 8, 64])
def test_chunks_do_not_change_what_a_repeat_reuses(chunk: int) -> None:
    for length in range(1, 120, 7):
        cache = CacheManager(KINDS["all"], [130, 130, 90], 4)
        run(cache, list(range(length)), chunk)
        assert run(cache, list(range(length)), chunk)[0] == (length - 1) // 4


def test_where_prompts_part_a_snapshot_is_taken() -> None:
    cache = manager(KINDS["full and states"], 60, 4)
    shared = list(range(17))
    run(cache, shared + [100] * 13)
    # The second leaves the first at 16: nothing to reuse there yet, except the snapshots of the interval (12).
    assert run(cache, shared + [101] * 13)[0] == 3
    assert run(cache, shared + [102] * 13)[0] == 4


def test_one_snapshot_per_interval_and_none_for_what_has_one() -> None:
    cache = CacheManager(KINDS["full and states"], [80, 40], 4, state_interval=16)
    run(cache, list(range(70)))
    ends = sorted(sum(at.count for at in path_to(node)) for node in cache.tree.nodes() if node.state)
    assert ends == [4, 8, 12, 16, 17]
    held = report.group_accounts(cache)[1]
    run(cache, list(range(70)))
    assert report.group_accounts(cache)[1] == held


def test_without_a_free_slot_a_request_runs_on_and_leaves_no_snapshot() -> None:
    cache = CacheManager(KINDS["full and states"], [40, 3], 4)
    assert run(cache, list(range(30)))[0] == 0
    assert run(cache, list(range(30)))[0] == 0 and report.group_accounts(cache)[1]["free"] == 2


def test_a_state_is_read_where_it_was_written_and_never_written_by_who_reads_it() -> None:
    cache = manager(KINDS["full and states"], 40, 4)
    tokens = list(range(20))
    run(cache, tokens)
    lease = cache.match("", ids(tokens), 19, rows(cache))
    read, write = lease.tables[1].tolist()
    assert lease.shared == 4 and read > 0 and write == 0
    assert cache.reserve(lease, 20)
    read, write = lease.tables[1].tolist()
    assert write > 0 and write != read
    cache.turn(lease, 20)
    assert lease.tables[1][0] == write and lease.tables[1][1] not in (0, write, read)
    audit.check(cache, [lease])


@pytest.mark.parametrize("kind", ["full and states", "all", "states alone"])
def test_the_state_at_the_last_page_border_of_an_answer_is_reused_by_the_next_turn(kind: str) -> None:
    for prompt in range(1, 14):
        for answer in range(12):
            cache = manager(KINDS[kind], 40, 4)
            tokens = list(range(prompt + answer))
            lease = cache.match("", ids(tokens), prompt - 1, rows(cache))
            computed = 0
            while computed < len(tokens):
                known = tokens[:prompt]
                count = cache.cut(lease, ids(known), computed, prompt - computed) if computed < prompt else 1
                computed += count
                assert cache.reserve(lease, computed)
                cache.turn(lease, computed)
                if computed <= prompt:
                    cache.commit(lease, ids(known), computed)
                cache.behind(lease, computed)
                audit.check(cache, [lease])
            assert lease.border[0] == (len(tokens) // 4 if len(tokens) // 4 > prompt // 4 else 0)
            cache.release(lease, ids(tokens), computed)
            audit.check(cache, [])
            assert cache.probe("", ids([*tokens, 99]), len(tokens)).num_pages == len(tokens) // 4


def test_where_no_slot_is_left_an_answer_goes_on_without_one_for_the_tree() -> None:
    cache = CacheManager(KINDS["full and states"], [40, 3], 4)
    tokens = list(range(30))
    lease = cache.match("", ids(tokens), 29, rows(cache))
    for computed in range(1, 31):
        assert cache.reserve(lease, computed)
        cache.turn(lease, computed)
        audit.check(cache, [lease])
    assert len(lease.own) == 2
    cache.release(lease, ids(tokens), 30)
    assert cache.probe("", ids(tokens), 29).num_pages == 0


def test_a_failed_step_leaves_the_state_that_was_kept_before_it() -> None:
    cache = manager(KINDS["full and states"], 40, 4)
    tokens = list(range(30))
    lease = cache.match("", ids(tokens), 29, rows(cache))
    seen: list[tuple[int, ...]] = []
    mark = 0
    for computed in range(1, 14):
        assert cache.reserve(lease, computed)
        seen.append((*lease.border, *sorted(lease.own), *lease.tables[1].tolist()))
        mark = cache.mark() if computed == 12 else mark
        cache.turn(lease, computed)
    assert lease.border[0] == 3
    undo.roll_back(cache, mark, [(lease, 11)], [])
    assert (*lease.border, *sorted(lease.own), *lease.tables[1].tolist()) == seen[11] and lease.border[0] == 2
    audit.check(cache, [lease])
    cache.release(lease, ids(tokens), 11)
    assert cache.probe("", ids(tokens), 29).num_pages == 2


def test_states_go_by_their_own_last_use_and_the_used_one_stays() -> None:
    cache = manager(KINDS["full and states"], 60, 4, slots=6)
    first, second = list(range(9)), list(range(100, 109))
    run(cache, first)
    run(cache, second)
    run(cache, first)  # read again: the other one is now the older
    run(cache, list(range(200, 209)))
    run(cache, list(range(300, 309)))
    assert cache.probe("", ids(first), 8).num_pages == 2
    assert cache.probe("", ids(second), 8).num_pages == 0


def test_a_lease_gives_back_what_lies_behind_its_window() -> None:
    cache = CacheManager([FULL, window(6)], [60, 12], 2)
    tokens = list(range(80))
    lease = cache.match("", ids(tokens), 79, rows(cache))
    for computed in range(4, 81, 4):
        assert cache.reserve(lease, computed)
        assert int((lease.tables[1] != 0).sum()) * 2 <= 5 + 4 + 2 * 2
        cache.commit(lease, ids(tokens), computed)
        cache.behind(lease, computed)
        assert int((lease.tables[1] != 0).sum()) * 2 <= 5 + 2 * 2
        audit.check(cache, [lease])
    assert lease.held == 40 and int((lease.tables[0] != 0).sum()) == 40


def test_a_long_hit_locks_only_the_end_of_the_window() -> None:
    cache = CacheManager([FULL, window(6)], [60, 60], 2)
    tokens = list(range(41))
    run(cache, tokens)
    lease = cache.match("", ids(tokens), 40, rows(cache))
    assert lease.shared == 20 and np.flatnonzero(lease.tables[1]).tolist() == [17, 18, 19]
    assert report.group_accounts(cache)[1]["evictable"] == 17 and report.group_accounts(cache)[0]["evictable"] == 0
    audit.check(cache, [lease])


def test_windows_inside_a_branch_go_first_and_its_end_last() -> None:
    cache = CacheManager([FULL, window(6)], [60, 33], 2)
    turns = [list(range(20)), list(range(40))]
    for turn in turns:
        run(cache, turn)
    taken = report.group_accounts(cache)[1]["cached"]
    assert taken == 20
    other = cache.match("x", ids([0]), 0, rows(cache))
    seen: list[int] = []
    for pages in range(12, 33):
        assert cache.reserve(other, pages * 2)
        seen.append(cache.probe("", ids(list(range(60))), 60).num_pages)
        assert cache.probe("", ids(turns[0]), 20).num_pages in (10, 0)
        audit.check(cache, [other])
        # Where the first turn ended is lost before the end of the second, not after it.
        assert seen[-1] == 20 or cache.probe("", ids(turns[0]), 20).num_pages == 0
    assert seen[:18] == [20] * 18  # 3 pages are all that the end needs
    assert seen[-1] == 0


def test_reuse_falls_back_to_an_earlier_end_when_the_last_is_gone() -> None:
    cache = CacheManager([FULL, window(4)], [31, 40], 2)
    for end in (20, 40, 60):
        run(cache, list(range(end)))
    assert cache.probe("", ids(list(range(70))), 70).num_pages == 30
    other = cache.match("x", ids([0]), 0, rows(cache))
    assert cache.reserve(other, 6)  # three pages of the longest branch go, and with them what its end needs
    assert cache.probe("", ids(list(range(70))), 70).num_pages == 27
    cache.tree.evict_from(cache.tree.windows[0], 21)  # all that no end of a turn needs
    cache.collect()
    assert cache.probe("", ids(list(range(70))), 70).num_pages == 27
    assert cache.reserve(other, 8)
    assert cache.probe("", ids(list(range(70))), 70).num_pages == 20
    audit.check(cache, [other])


def test_a_window_page_that_was_lost_is_healed_by_who_computes_it_again() -> None:
    cache = CacheManager([FULL, window(6)], [60, 40], 2)
    tokens = list(range(30))
    run(cache, tokens)
    cache.tree.evict_from(cache.tree.windows[0], 15)
    cache.collect()
    assert cache.probe("", ids(tokens), 30).num_pages == 0
    before = report.group_accounts(cache)[0]["cached"]
    run(cache, tokens)
    assert cache.probe("", ids(tokens), 30).num_pages == 15 and report.group_accounts(cache)[0]["cached"] == before
    audit.check(cache, [])


def test_all_groups_or_nothing() -> None:
    cache = CacheManager([FULL, window(6), STATE], [20, 5, 8], 2)
    lease = cache.match("", ids([1]), 0, rows(cache))
    assert not cache.reserve(lease, 20)
    assert not any(table.any() for table in lease.tables) and cache.held_pages == 0 and lease.held == 0
    assert cache.reserve(lease, 8)
    others = [cache.match("", ids([2]), 0, rows(cache)) for _ in range(2)]
    assert not cache.reserve_one_each(others) and cache.held_pages == 4
    audit.check(cache, [lease, *others])


def test_what_is_evicted_is_told_with_the_hash_of_its_prefix_before_it_is_free() -> None:
    cache = CacheManager([FULL, window(4), STATE], [20, 20, 20], 2)
    told: list[tuple[int, bytes, int]] = []

    def listen(group: int, items: list[tuple[bytes, int]]) -> None:
        for chain, page in items:
            assert page not in cache.allocators[group].free_pages()
            told.append((group, chain, page))

    run(cache, list(range(9)))
    chain = [each for node in cache.tree.nodes() for each in hashes(node)]
    assert len(set(chain)) == 4 and all(len(each) == 16 for each in chain)
    cache.on_evict = listen
    lease = cache.match("x", ids([0]), 0, rows(cache))
    assert cache.reserve(lease, 36)
    assert {each for group, each, _ in told if group == 0} == set(chain[1:])
    assert {each for group, each, _ in told if group == 1} >= set(chain[1:])
    assert [each for group, each, _ in told if group == 2] == [chain[-1]]
    audit.check(cache, [lease])


def test_a_hash_stands_for_the_whole_prefix_and_its_namespace() -> None:
    def chain(name: str, tokens: list[int], cut: int = 0) -> list[bytes]:
        cache = CacheManager([FULL], [20], 2)
        lease = cache.match(name, ids(tokens), 0, rows(cache))
        assert cache.reserve(lease, len(tokens))
        cache.commit(lease, ids(tokens), cut)
        cache.release(lease, ids(tokens), len(tokens))
        return [each for node in cache.tree.nodes() for each in hashes(node)]

    whole = chain("", [1, 2, 3, 4, 5, 6])
    assert whole == chain("", [1, 2, 3, 4, 5, 6], cut=4) and whole[:2] == chain("", [1, 2, 3, 4])
    assert not set(whole) & set(chain("a", [1, 2, 3, 4, 5, 6]))
    assert chain("", [9, 2, 3, 4])[1] != whole[1]


def test_namespaces_never_run_together() -> None:
    parts = ["", "a", "1:", "a1", "1:1:a", "\x1f"]
    made = {namespace(a, b, c) for a in parts for b in parts for c in parts}
    assert len(made) == len(parts) ** 3 and namespace() == ""


def test_a_held_node_keeps_all_that_hangs_on_it() -> None:
    cache = CacheManager([FULL, window(4), STATE], [12, 12, 5], 2)
    run(cache, list(range(9)))
    (node,) = [node for node in cache.tree.nodes() if node.state]
    hold = cache.hold(node)
    lease = cache.match("x", ids([0]), 0, rows(cache))
    assert not cache.reserve(lease, 22)
    assert cache.probe("", ids(list(range(9))), 8).num_pages == 4
    audit.check(cache, [lease])
    cache.drop(hold)
    assert cache.reserve(lease, 22) and cache.probe("", ids(list(range(9))), 8).num_pages == 0
    audit.check(cache, [lease])


def test_check_notices_a_lost_window_lock_and_a_lost_snapshot_lock() -> None:
    for spoil in ("window", "state"):
        cache = CacheManager(KINDS["all"], [40, 40, 10], 4)
        run(cache, list(range(30)))
        lease = cache.match("", ids(list(range(30))), 29, rows(cache))
        audit.check(cache, [lease])
        if spoil == "window":
            cache.tree.windows[0].locks[lease.tables[1][lease.shared - 1]] = 0
        else:
            lease.snapshots.clear()
        with pytest.raises(AssertionError, match="lock"):
            audit.check(cache, [lease])


def test_a_failed_step_gives_window_pages_and_slots_back_as_they_were() -> None:
    cache = manager(KINDS["all"], 40, 4)
    tokens = list(range(40))
    lease = cache.match("", ids(tokens), 39, rows(cache))
    for end in (8, 12):
        assert cache.reserve(lease, end)
        cache.turn(lease, end)
        cache.commit(lease, ids(tokens), end)
        cache.behind(lease, end)
    assert cache.reserve(lease, 24)
    before = [table.copy() for table in lease.tables]
    shared, mark = lease.shared, cache.mark()
    cache.turn(lease, 16)
    given = [cache.given(lease)]
    cache.commit(lease, ids(tokens), 16)
    cache.turn(lease, 24)
    given.append(cache.given(lease))
    cache.commit(lease, ids(tokens), 24)
    assert cache.probe("", ids(tokens), 24).num_pages == 6
    undo.roll_back(cache, mark, [(lease, 9)], given)
    assert lease.shared == shared and all((a == b).all() for a, b in zip(lease.tables, before, strict=True))
    assert cache.probe("", ids(tokens), 24).num_pages == shared
    audit.check(cache, [lease])


def test_who_read_what_was_never_computed_goes_on_from_what_was() -> None:
    cache = manager(KINDS["all"], 60, 4, slots=20)
    tokens = list(range(40))
    writer = cache.match("", ids(tokens), 39, rows(cache))
    given: list[Given] = []
    marks: list[int] = []
    for end in (12, 28):
        marks.append(cache.mark())
        assert cache.reserve(writer, end)
        cache.turn(writer, end)
        given.append(cache.given(writer))
        cache.commit(writer, ids(tokens), end)
    reader = cache.match("", ids(tokens), 39, rows(cache))
    assert reader.shared == 7 and cache.reserve(reader, 32)
    undo.roll_back(cache, marks[1], [(writer, 9), (reader, 9)], given[1:])
    audit.check(cache, [writer, reader])
    assert (writer.shared, writer.held) == (3, 7) and (reader.shared, reader.held) == (3, 3)
    assert reader.tables[2][0] == writer.tables[2][0] != 0  # both read the snapshot at 12
    assert reader.tables[2][1] not in writer.tables[2]
