"""Who has a place, who gives way, who waits: the desk alone, over sites that keep nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from phloem.adapters import desk as room
from phloem.adapters.desk import Desk, Loan, Read, Version, one_thread
from phloem.core.errors import BadRequest


class Done:
    """Work that has ended."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self._found


class One:
    nbytes = 10


class Sites:
    beside = False

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.puts: list[int] = []

    def put(self, entry: int, fits: Any, own: Any = None) -> None:
        self.puts.append(entry)


class Counter(Desk):
    """A desk whose adapters are read at once, or not at all."""

    def __init__(self, entries: int, memory: int | None = None) -> None:
        sites: Any = Sites(entries)
        super().__init__(sites, lambda work: Done(work()), lambda name: None, None, memory)  # type: ignore[arg-type, return-value]
        self.missing: set[str] = set()
        self.slow: dict[str, Future[Any]] = {}
        self.reads = 0

    def read(self, version: Version) -> Future[Any]:
        self.reads += 1
        found: Future[Any] = Future()
        if version.path in self.slow:
            return self.slow[version.path]
        if version.path in self.missing:
            found.set_exception(BadRequest("it has gone"))
        else:
            found.set_result(Read({0: One()}, None))  # type: ignore[dict-item]
        return found

    def have(self, *names: str, pinned: bool = False) -> None:
        for name in names:
            self.load(name, f"/{name}", pinned).result()


def until_ready(loan: Loan, turns: int = 10) -> bool:
    return any(loan.ready() for _ in range(turns))


def test_the_one_unused_for_longest_gives_way_and_is_read_again() -> None:
    desk = Counter(2)
    desk.have("a", "b")
    desk.give_back(_taken(desk, "a"))
    desk.have("c")
    assert {name: bool(version.entry) for name, version in desk._names.items()} == {"a": True, "b": False, "c": True}
    loan = desk.lend("b")
    assert not loan.ready() and until_ready(loan) and loan.entry
    assert desk.reads == 4 and desk.evictions == 2


def _taken(desk: Desk, name: str) -> Loan:
    loan = desk.lend(name)
    assert until_ready(loan) and loan.error is None
    return loan


def test_those_in_use_keep_their_places_and_others_wait() -> None:
    desk = Counter(2)
    desk.have("a", "b", pinned=False)
    one, two = _taken(desk, "a"), _taken(desk, "b")
    desk.have("c")  # known, but not in a place
    third = desk.lend("c")
    assert not until_ready(third)
    desk.give_back(one)
    assert until_ready(third) and {third.entry, two.entry} == {1, 2}


def test_pinned_ones_stay() -> None:
    desk = Counter(2)
    desk.load("p", "/p", True).result()
    desk.have("a", "b", "c")
    assert desk._names["p"].entry and desk._names["c"].entry and not desk._names["a"].entry
    with pytest.raises(BadRequest, match="one must stay free"):
        desk.load("q", "/q", True)


def test_a_name_that_is_loaded_again_is_another_version_and_the_old_one_ends_with_its_users() -> None:
    desk = Counter(3)
    desk.have("a")
    old = _taken(desk, "a")
    desk.have("a")
    new = _taken(desk, "a")
    assert old.uid != new.uid and old.entry != new.entry
    assert desk.state()["loras_loaded"] == 2
    desk.give_back(old)
    assert desk.state()["loras_loaded"] == 1


def test_unloading_tells_how_many_go_on_and_frees_the_place_with_the_last() -> None:
    desk = Counter(2)
    desk.have("a")
    loans = [_taken(desk, "a") for _ in range(3)]
    assert desk.unload("a") == (3, {})
    with pytest.raises(BadRequest, match="there is no adapter 'a'"):
        desk.lend("a")
    for loan in loans:
        assert desk.state()["loras_loaded"] == 1
        desk.give_back(loan)
    assert desk.state()["loras_loaded"] == 0


def test_one_that_cannot_be_read_fails_its_requests_and_may_come_back() -> None:
    desk = Counter(1)
    desk.have("a", "b")
    desk.missing = {"/a"}
    loan = desk.lend("a")
    assert until_ready(loan) and "gone" in str(loan.error)
    desk.give_back(loan)
    desk.missing = set()
    assert _taken(desk, "a").entry == 1


def test_memory_is_kept_to_and_what_never_fits_is_refused() -> None:
    desk = Counter(8, memory=25)
    desk.have("a", "b", "c")
    assert desk.state()["lora_bytes"] == 20 and not desk._names["a"].entry
    small = Counter(8, memory=5)
    with pytest.raises(BadRequest, match="lora_memory"):
        small.have("a")
    assert small.loaded() == {} and small.state()["loras_loaded"] == 0


def test_a_failed_load_leaves_the_one_that_was_there() -> None:
    desk = Counter(2)
    desk.have("a")
    uid = _taken(desk, "a").uid
    desk.missing = {"/other"}
    with pytest.raises(BadRequest, match="gone"):
        desk.load("a", "/other", False).result()
    assert _taken(desk, "a").uid == uid and desk.loaded() == {"a": "/a"}


def test_whoever_waits_long_for_a_place_is_let_in_before_later_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    monkeypatch.setattr(room.time, "monotonic", clock)
    desk = Counter(1)
    desk.have("a")
    running = _taken(desk, "a")
    desk.have("b")
    waiting = desk.lend("b")
    assert not until_ready(waiting)
    assert until_ready(desk.lend("a"))  # not late yet
    desk_users = desk._names["a"].users
    now[0] += 60.0
    later = desk.lend("a")
    assert not until_ready(later) and desk._names["a"].users == desk_users == 2
    desk.give_back(running)
    desk._names["a"].users = 0
    assert until_ready(waiting) and waiting.entry == 1
    assert not until_ready(later)  # the only place is in use
    desk.give_back(waiting)
    assert until_ready(later)


READ = Read({0: One()}, None)  # type: ignore[dict-item]


def test_of_two_loads_of_a_name_the_one_that_was_asked_for_later_stays() -> None:
    desk = Counter(2)
    desk.slow["/slow"] = Future()
    first, second = desk.load("a", "/slow", False), desk.load("a", "/fast", False)
    assert not first.done()
    second.result()
    desk.slow["/slow"].set_result(READ)
    assert first.result() == {"a": "/fast"}
    assert desk.state()["loras_loaded"] == 1


def test_pinned_ones_on_their_way_count_too() -> None:
    desk = Counter(2)
    first = desk.load("p", "/p", True)
    with pytest.raises(BadRequest, match="one must stay free"):
        desk.load("q", "/q", True)
    first.result()
    desk.unload("p")
    desk.load("q", "/q", True).result()


@pytest.mark.parametrize(("based", "reads"), [(True, 2), (False, 1)])
def test_new_weights_have_those_read_again_that_were_read_meanwhile(based: bool, reads: int) -> None:
    desk, reading = Counter(2), Future[Any]()
    desk.slow["/a"] = reading
    loading = desk.load("a", "/a", False)
    assert not loading.done()
    if based:
        desk._based.add("/a")
    desk.rebase()
    reading.set_result(READ)
    loading.result()
    assert (desk.reads, desk.state()["loras_loaded"]) == (reads, 1)


def test_whoever_waits_for_an_adapter_gets_it_of_the_new_weights() -> None:
    desk = Counter(1)
    desk.have("a", "b")
    desk.slow["/a"] = Future()
    waiting = desk.lend("a")
    assert not waiting.ready()
    desk._based.add("/a")
    desk.rebase()
    desk.slow.pop("/a").set_result(READ)
    assert until_ready(waiting) and desk.reads == 4


def test_who_computes_again_gets_the_adapter_of_the_new_weights_whatever_has_its_name_by_then() -> None:
    """`renewed`: of versions that the base's weights are part of, also where their name is nobody's."""
    desk = Counter(4)
    desk.have("a", "plain")
    first, other = _taken(desk, "a"), _taken(desk, "plain")
    desk._based.add("/a")
    assert desk.renewed(first) is first
    desk.rebase()
    again: Any = desk.renewed(first)
    assert again is not first and again.uid != first.uid and desk.renewed(other) is other
    assert again.version is desk._names["a"] and until_ready(again) and again.entry
    assert not first.version.users and not first.version.entry, "the old one keeps its place"
    desk.unload("a")
    desk.rebase()
    desk.rebase()
    last: Any = desk.renewed(again)
    assert last.uid not in (first.uid, again.uid) and until_ready(last) and desk.renewed(last) is last
    assert "a" not in desk.loaded()
    desk.give_back(last)
    desk.give_back(other)
    assert desk.state()["loras_loaded"] == 1


def test_nobody_polls_for_what_is_read_or_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for it sleeps until it is there."""

    def sleep(_: float) -> None:
        raise AssertionError("somebody polls")

    desk, first, second = Counter(2), Future[Any](), Future[Any]()
    desk.slow["/a"] = reading = Future[Any]()
    second.set_result("there")
    pairs = ((desk.load("a", "/a", False), (reading, READ)), (room.Placing(first, 1), (first, second)))
    for waited, (late, found) in pairs:
        monkeypatch.setattr("time.sleep", sleep)
        timer = threading.Timer(0.05, late.set_result, (found,))
        timer.start()
        assert waited.result() in ({"a": "/a"}, "there")
        monkeypatch.undo()


def test_a_thread_that_reads_has_none_of_torch_s_beside_it_and_all_others_have_as_many_as_before() -> None:
    own, seen = torch.get_num_threads(), list[int]()

    def ask(first: Callable[[], None] | None = None) -> None:
        if first is not None:
            first()
        seen.append(torch.get_num_threads())

    for first in (None, one_thread, None):  # what a new thread has may be another number than this one's own
        thread = threading.Thread(target=ask, args=(first,))
        thread.start()
        thread.join()
    assert seen == [seen[0], 1, seen[0]] and torch.get_num_threads() == own
