"""Groups of memory: random lives of requests against a brute force, then hand-made cases of windows and states."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phloem.core.memory import Group
from phloem.kvcache.manager import CacheManager, Given, Lease
from phloem.kvcache.node import path_to

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
    return [account["free"] + account["evictable"] for account in cache.group_accounts()]


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

    def launch(self, request: Running, count: int, give: bool) -> bool:
        """One step of a request; False where memory is short, and then too little could be had."""
        cache, lease, start = self.cache, request.lease, request.computed
        count = cache.cut(lease, ids(request.tokens), start, min(count, len(request.tokens) - start))
        if count <= 0:
            return False
        end = start + count
        missing, room = max(0, -(-end // self.size) - lease.held), available(cache)
        need = [2 - len(lease.own) if group.kind == "state" else missing for group in cache.groups]
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
        cache.turn(lease)
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
        self.cache.roll_back(first.mark, leases, [item for step in self.flight for item in step.given])
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
        self.cache.check([request.lease for request in self.running])
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
    @rule(which=st.integers(0, 3), count=st.integers(1, 12), give=st.booleans())
    def launch(self, which: int, count: int, give: bool) -> None:
        world = self.world
        if len(world.flight) < 3:
            world.launch(world.running[which % len(world.running)], count, give)

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
        for account in self.world.cache.group_accounts():
            assert account["held"] == 0 and account["free"] + account["evictable"] == account["total"]


Lives.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLives = Lives.TestCase
