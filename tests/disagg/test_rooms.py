"""Rooms in each state, and what can go wrong there: the answer is one server's, nothing stays locked, nobody hangs."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from disagg_support import FACTS, FakeLender, Pair, until

from phloem.disagg import arrivals, rooms
from phloem.disagg.bootstrap import Book, Bootstrap, Directory, Unknown, machine_id
from phloem.disagg.transports import TRANSPORTS
from phloem.disagg.wire import Alive, Ask, Done, Link, LinkLost, Pages, Refused, digest_of
from phloem.testing.driver import random_tokens, storm

PROMPT = random_tokens(random.Random(3), 42)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def answered(pair: Pair, name: str, prompt: list[int], count: int = 8, seed: int = 0) -> bool:
    return pair.decode.tokens[name] == pair.decode.expected(prompt, count, seed)


def fetched(pair: Pair) -> tuple[int, int]:
    state = pair.arrivals.state()
    return state["rooms_fetched"], state["rooms_failed"]


@pytest.mark.parametrize("backend", TRANSPORTS.names())
def test_pages_and_first_token_of_one_server_are_gone_on_from_by_another(backend: str) -> None:
    pair = Pair(backend)
    pair.both("a", PROMPT)
    pair.run()
    assert answered(pair, "a", PROMPT) and fetched(pair) == (1, 0)
    assert pair.prefill.tokens["a"] == pair.decode.tokens["a"][:1]
    assert pair.arrivals.state()["kv_transfer_pages"] == len(PROMPT) // 4
    pair.close()


def test_a_decode_server_has_no_store_to_be_cleared(pair: Pair) -> None:
    reply = pair.decode.control("clear_hicache_storage")
    assert reply is not None and not reply.ok and "no storage" in reply.message
    pair.both("a", PROMPT)
    pair.run()
    assert answered(pair, "a", PROMPT)


def test_an_adapter_that_both_have_is_carried_over_whatever_it_is_called_inside(pair: Pair) -> None:
    for driver in (pair.prefill, pair.decode):
        driver.scheduler.lender = FakeLender("one")
    pair.both("a", PROMPT, adapter="poet")
    pair.run()
    assert answered(pair, "a", PROMPT) and fetched(pair) == (1, 0)


def test_what_decode_has_is_not_sent(pair: Pair) -> None:
    pair.both("a", PROMPT)
    pair.run()
    longer = PROMPT[:40] + random_tokens(random.Random(4), 21)
    pair.both("b", longer)
    pair.run()
    assert answered(pair, "b", longer)
    assert pair.arrivals.state()["kv_transfer_pages"] == 10 + 61 // 4 - 10


def test_whichever_comes_first_waits_for_the_other(pair: Pair) -> None:
    pair.to_decode("a", PROMPT)
    pair.decode.step(3)
    time.sleep(0.05)
    pair.to_prefill("a", PROMPT)
    pair.run()
    pair.to_prefill("b", PROMPT[1:])
    until(lambda: "b" in pair.prefill.finish, pair.prefill)
    pair.to_decode("b", PROMPT[1:])
    pair.run()
    assert answered(pair, "a", PROMPT) and answered(pair, "b", PROMPT[1:]) and fetched(pair) == (2, 0)


def test_many_at_once_with_prefixes_penalties_seeds_and_ends(pair: Pair) -> None:
    rng, want = random.Random(5), dict[str, list[int]]()
    for index in range(30):
        name, prompt = f"q{index}", PROMPT[: rng.randrange(40)] + random_tokens(rng, rng.randrange(1, 60), kinds=3)
        new = rng.randrange(1, 20)
        if index % 3 == 0:
            place = len(prompt) + rng.randrange(new)
            for driver in (pair.prefill, pair.decode):
                driver.runner.force[name] = {place: 2}
        want[name] = pair.decode.expected(prompt, new, index, pair.decode.runner.force.get(name))
        pair.both(name, prompt, new, seed=index)
    pair.run()
    assert pair.decode.tokens == want and fetched(pair) == (30, 0)


def test_logprobs_of_prompt_and_first_token_come_along(pair: Pair) -> None:
    wants = {"return_logprob": True, "logprob_start": 2, "top_logprobs": 2}
    pair.both("a", PROMPT, **wants)
    pair.run()
    pair.decode.submit("alone", PROMPT, 8, **wants)
    pair.decode.run()
    there, here = pair.decode.chunks["a"][0], pair.decode.chunks["alone"][0]
    assert there.prompt_logprobs == here.prompt_logprobs
    assert pair.decode.joined("a") == pair.decode.joined("alone")


def test_a_prompt_shorter_than_a_page_brings_its_first_token_alone(pair: Pair) -> None:
    pair.both("a", [11, 12, 13])
    pair.both("one", PROMPT, 1)
    pair.run()
    assert answered(pair, "a", [11, 12, 13]) and answered(pair, "one", PROMPT, 1) and fetched(pair) == (2, 0)


def test_a_decode_server_short_of_pages_preempts_and_answers_the_same() -> None:
    pair = Pair(num_pages=40)
    rng = random.Random(7)
    want = dict[str, list[int]]()
    for index in range(8):
        prompt = random_tokens(rng, 40)
        want[f"q{index}"] = pair.decode.expected(prompt, 30, index)
        pair.both(f"q{index}", prompt, 30, seed=index)
    pair.run()
    assert pair.decode.tokens == want
    pair.close()


# faults, by the state that the room is in


def never_asked(pair: Pair) -> None:
    """Decode's request comes, prefill's never does."""
    pair.rooms._meet_seconds = 0.2  # pyright: ignore[reportPrivateUsage]
    pair.to_decode("a", PROMPT)


def no_server(pair: Pair) -> None:
    pair.bootstrap.close()
    pair.to_decode("a", PROMPT)


def other_facts(pair: Pair) -> None:
    pair.facts["page_size"] = "16"
    pair.both("a", PROMPT)


def other_weights(pair: Pair) -> None:
    pair.weights["decode"] = "2"
    pair.both("a", PROMPT)


def weights_change_while_it_computes(pair: Pair) -> None:
    pair.both("a", PROMPT)
    pair.prefill.step(2)
    pair.weights["prefill"] = "2"


def another_prompt(pair: Pair) -> None:
    pair.to_prefill("a", PROMPT[1:])
    pair.to_decode("a", PROMPT)


def another_adapter(pair: Pair) -> None:
    """Of the same name, and with other weights there."""
    for driver, content in ((pair.prefill, "one"), (pair.decode, "two")):
        driver.scheduler.lender = FakeLender(content)
    pair.both("a", PROMPT, adapter="poet")


def aborted_there_before_it_computes(pair: Pair) -> None:
    pair.both("a", PROMPT)
    pair.prefill.abort("a")


def aborted_there_while_it_computes(pair: Pair) -> None:
    pair.both("a", PROMPT)
    pair.prefill.step(2)  # of three
    pair.prefill.abort("a")


def failed_there(pair: Pair) -> None:
    pair.prefill.runner.fail_row = lambda name, position: "injected"
    pair.both("a", PROMPT)


def emptied_there(pair: Pair) -> None:
    pair.both("a", PROMPT)
    pair.prefill.step(2)
    requests = pair.prefill.scheduler.slots.running()
    start_over = pair.prefill.scheduler._start_over  # pyright: ignore[reportPrivateUsage]
    start_over(requests, RuntimeError("injected"), "a step")


def it_was_fetched_before(pair: Pair) -> None:
    """A message for a room that has been cleared does not bring it back."""
    pair.both("a", PROMPT)
    pair.run()
    pair.decode.tokens.clear()
    pair.decode.finish.clear()
    pair.decode.cache.reset()
    pair.arrivals.counts.fetched = 0
    pair.to_decode("a", PROMPT)


def prefill_takes_too_long(pair: Pair) -> None:
    pair.arrivals._wait = 0.2  # pyright: ignore[reportPrivateUsage]
    pair.to_decode("a", PROMPT)
    pair.to_prefill("a", PROMPT)
    until(lambda: "a" in pair.decode.finish, pair.decode)  # prefill stands still


FAULTS = [
    never_asked,
    no_server,
    other_facts,
    other_weights,
    weights_change_while_it_computes,
    another_prompt,
    another_adapter,
    aborted_there_before_it_computes,
    aborted_there_while_it_computes,
    failed_there,
    emptied_there,
    it_was_fetched_before,
    prefill_takes_too_long,
]


@pytest.mark.slow
@pytest.mark.parametrize("backend", TRANSPORTS.names())
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_fails_decode_computes_the_prompt(fault: Callable[[Pair], None], backend: str) -> None:
    pair = Pair(backend, keep=0.3)
    fault(pair)
    pair.run()
    assert answered(pair, "a", PROMPT) and fetched(pair) == (0, 1)
    pair.both("b", PROMPT[3:])  # and whoever comes next is served
    pair.run()
    assert answered(pair, "b", PROMPT[3:])
    pair.close()


def test_pages_that_nobody_fetches_are_locked_for_a_while_only() -> None:
    pair = Pair(keep=0.2)
    pair.to_prefill("a", PROMPT)
    until(lambda: "a" in pair.prefill.finish, pair.prefill)
    assert len(pair.prefill.cache.holds) == 1 and pair.prefill.scheduler.busy
    pair.run()
    assert pair.rooms.state()["rooms_lost"] == 1 and not pair.prefill.scheduler.busy
    pair.close()


@pytest.mark.parametrize("when", ["at once", "while pages come", "when all is here"])
def test_an_abort_at_decode_frees_both_sides(when: str) -> None:
    pair = Pair(keep=0.3)
    pair.both("a", PROMPT)
    if when == "while pages come":
        until(lambda: pair.arrivals.counts.pages > 0, pair.prefill)
    elif when == "when all is here":
        until(lambda: pair.arrivals.counts.fetched > 0, pair.prefill)
    pair.decode.abort("a")
    pair.run()
    assert "a" not in pair.decode.tokens
    pair.close()


def room_state(pair: Pair, state: str) -> bool:
    rooms = pair.rooms._rooms.values()  # pyright: ignore[reportPrivateUsage]
    if state == "prefill has not heard of it":
        return pair.rooms._links > pair.rooms._new  # pyright: ignore[reportPrivateUsage]
    if state == "it waits to be computed":
        return any(room.served for room in rooms)
    return (pair.arrivals.counts.pages if state == "pages come" else pair.arrivals.counts.fetched) > 0


@pytest.mark.parametrize(
    "state", ["prefill has not heard of it", "it waits to be computed", "pages come", "all of it is there"]
)
def test_a_peer_that_is_gone_in_any_state_costs_time_alone(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system closes what a killed process had: either side sees the other one go."""
    links: list[Link] = []
    monkeypatch.setattr(rooms, "Link", lambda sock: links.append(Link(sock)) or links[-1])
    pair = Pair()
    pair.to_decode("a", PROMPT)
    if state != "prefill has not heard of it":
        pair.to_prefill("a", PROMPT)
    computing = () if state == "it waits to be computed" else (pair.prefill,)
    until(lambda: room_state(pair, state), *computing)
    for link in links:
        with contextlib.suppress(OSError):  # it may have ended by itself
            link.sock.shutdown(socket.SHUT_RDWR)
    pair.run()
    assert answered(pair, "a", PROMPT)
    # Of pages that come the last one may have come before the end was seen.
    allowed = {"all of it is there": [(1, 0)], "pages come": [(0, 1), (1, 0)]}.get(state, [(0, 1)])
    assert fetched(pair) in allowed
    pair.both("b", PROMPT[3:])
    pair.run()
    assert answered(pair, "b", PROMPT[3:])
    pair.close()


def test_a_room_that_is_in_use_is_refused_and_can_be_used_again(pair: Pair) -> None:
    pair.to_prefill("a", PROMPT)
    pair.prefill.submit("b", PROMPT, 8, room="a/0")
    pair.prefill.step()
    refused = pair.prefill.finish["b"]
    assert refused.status_code == 400 and refused.param == "bootstrap_room" and "in use" in str(refused.message)
    pair.to_decode("a", PROMPT)
    pair.run()
    assert fetched(pair) == (1, 0)


def test_a_name_that_is_used_again_gets_no_pages_of_who_had_it_before(pair: Pair) -> None:
    pair.both("a", PROMPT)
    arrival = pair.arrivals._coming["a"]  # pyright: ignore[reportPrivateUsage]
    until(lambda: arrival.ended, pair.prefill)
    pair.decode.abort("a")
    other = random_tokens(random.Random(6), 42)
    pair.decode.submit("a", other, 8)
    pair.run()
    assert answered(pair, "a", other)


class FakePrefill:
    """Says what a test wants to a decode server: `talk` gets the connection behind the `Ask`."""

    def __init__(self, talk: Callable[[Link, Ask], None]) -> None:
        transport = TRANSPORTS.get("tcp")()
        self._sock, address = transport.listen("127.0.0.1")
        own = {"phloem": {"machine": machine_id(), "addresses": {"tcp": address}}}
        self.bootstrap = Bootstrap("127.0.0.1", 0, Directory({}, own))
        self._talk = talk
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        sock, _ = self._sock.accept()
        link = Link(sock)
        ask = link.receive(5)
        assert isinstance(ask, Ask)
        self._talk(link, ask)
        link.close()


def silent(link: Link, ask: Ask) -> None:
    time.sleep(3)


def cut_inside_a_page(link: Link, ask: Ask) -> None:
    link.send(Pages(0, 2), 2)
    link.write(b"x" * 9, 2)


def pages_not_asked_for(link: Link, ask: Ask) -> None:
    link.send(Pages(0, 1 << 30), 2)


def too_few_pages(link: Link, ask: Ask) -> None:
    link.send(Done(5, "1"), 2)


def no_frame(link: Link, ask: Ask) -> None:
    link.write(struct.pack(">I", 4) + b"\xc1\xc1\xc1\xc1", 2)


def a_frame_without_end(link: Link, ask: Ask) -> None:
    link.write(struct.pack(">I", 0xFFFFFFFF), 2)


def an_ask(link: Link, ask: Ask) -> None:
    link.send(ask, 2)


TALKS = [silent, cut_inside_a_page, pages_not_asked_for, too_few_pages, no_frame, a_frame_without_end, an_ask]


@pytest.mark.slow
@pytest.mark.parametrize("talk", TALKS)
def test_a_prefill_server_that_talks_nonsense_costs_time_alone(
    talk: Callable[[Link, Ask], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "SILENCE", 0.3)
    pair, fake = Pair("tcp"), FakePrefill(talk)
    pair.to_decode("a", PROMPT, prefill_port=fake.bootstrap.port)
    pair.run()
    assert answered(pair, "a", PROMPT) and fetched(pair) == (0, 1)
    fake.bootstrap.close()
    pair.close()


def ask_of(pair: Pair, prompt: list[int], **changed: Any) -> Ask:
    values: dict[str, Any] = {
        "room": "a/0",
        "digest": digest_of(np.array(prompt, np.int32)),
        "start": 0,
        "end": len(prompt) // 4,
        "facts": {**FACTS, "weight_version": "1"},
        **changed,
    }
    return Ask(**values)


def first_of(pair: Pair, ask: Ask) -> Any:
    """What a prefill server answers an `Ask`, over sockets."""
    transport = TRANSPORTS.get("tcp")()
    link = Link(transport.connect(pair.rooms.addresses["tcp"], "127.0.0.1", 2))
    try:
        link.send(ask, 2)
        while isinstance(found := link.receive(3), Alive):
            pass
        return found
    finally:
        link.close()


def test_what_a_prefill_server_refuses_it_says_why() -> None:
    pair = Pair("tcp", meet=0.1)
    pair.to_prefill("a", PROMPT)
    until(lambda: "a" in pair.prefill.finish, pair.prefill)
    wrong = {
        "page_size is '8' there": ask_of(pair, PROMPT, facts={**FACTS, "page_size": "8", "weight_version": "1"}),
        "cannot be had": ask_of(pair, PROMPT, end=1 << 40),
        "its prompt or its adapter is another": ask_of(pair, PROMPT, digest=b"0" * 16),
        "no request came for it": ask_of(pair, PROMPT, room="b/0"),
    }
    for why, ask in wrong.items():
        found = first_of(pair, ask)
        assert isinstance(found, Refused) and why in found.reason
    assert isinstance(first_of(pair, ask_of(pair, PROMPT)), Pages)  # who then hangs up: the room is over
    pair.run()
    assert isinstance(first_of(pair, ask_of(pair, PROMPT)), Refused)
    pair.close()


def test_a_prefill_server_outlives_clients_that_are_none() -> None:
    pair = Pair("tcp")
    port = int(pair.rooms.addresses["tcp"].rpartition("|")[2])
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, struct.pack(">I", 3) + b"abc"):
        with socket.create_connection(("127.0.0.1", port), 2) as sock:
            sock.sendall(data)
    pair.both("a", PROMPT)
    pair.run()
    assert answered(pair, "a", PROMPT) and fetched(pair) == (1, 0)
    pair.close()


def test_memory_that_could_shrink_is_not_written_to() -> None:
    pair = Pair("shm")
    pair.to_prefill("a", PROMPT)
    until(lambda: "a" in pair.prefill.finish, pair.prefill)
    transport = TRANSPORTS.get("shm")()
    link = Link(transport.connect(pair.rooms.addresses["shm"], "", 2))
    link.send(ask_of(pair, PROMPT), 2)
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 1 << 20)
    socket.send_fds(link.sock, [b"m"], [fd])
    os.close(fd)
    with pytest.raises(LinkLost):
        link.receive(3)
    link.close()
    pair.to_decode("a", PROMPT)
    pair.run()
    assert answered(pair, "a", PROMPT) and fetched(pair) == (1, 0)
    pair.close()


def test_servers_of_other_makes_are_named() -> None:
    other = Bootstrap("127.0.0.1", 0, Directory({}, {"rank_ip": "1.2.3.4", "rank_port": 5}))
    with pytest.raises(Unknown, match="not of this engine"):
        Book([]).find("127.0.0.1", other.port)
    other.close()
    with pytest.raises(Unknown, match="does not answer"):
        Book([]).find("127.0.0.1", other.port)


def test_a_storm_without_rooms_runs_beside(pair: Pair) -> None:
    want = storm(pair.decode, 20, random.Random(9))
    pair.both("a", PROMPT)
    pair.run()
    assert {name: pair.decode.tokens[name] for name in want} == want and answered(pair, "a", PROMPT)
