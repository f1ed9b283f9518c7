"""Peers that are none, slow or greedy: at the ports of a prefill server, and where a decode server fetches from."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from disagg_support import FACTS, Pair, until

from phloem.core.errors import BadRequest
from phloem.disagg import bootstrap, rooms, wire
from phloem.disagg.bootstrap import Book, Bootstrap, Directory, Unknown, machine_id
from phloem.disagg.transports import TRANSPORTS
from phloem.disagg.wire import Ask, Done, Link, LinkLost, Pages, Position, Refused, digest_of
from phloem.protocol.rooms import meetings

PROMPT = list(range(5, 47))


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair("tcp")
    yield made
    made.close()


def port_of(pair: Pair) -> int:
    return int(pair.rooms.addresses["tcp"].rpartition("|")[2])


def closed_by_peer(sock: socket.socket, seconds: float) -> bool:
    sock.settimeout(seconds)
    try:
        while sock.recv(4096):
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def dripping(sock: socket.socket, ended: threading.Event, piece: bytes = b"x") -> None:
    while not ended.wait(0.05):
        try:
            sock.sendall(piece)
        except OSError:
            return


# wire


def joined() -> tuple[Link, Link]:
    one, two = socket.socketpair()
    return Link(one), Link(two)


@pytest.mark.slow
def test_what_is_sent_slowly_but_steadily_is_not_lost() -> None:
    """The time limit is for a peer that takes nothing, not for a network that takes its time."""
    here, there = joined()
    here.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    there.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    data, got = bytes(3 << 20), bytearray()

    def read() -> None:
        while len(got) < len(data):
            got.extend(there.sock.recv(1 << 18))
            time.sleep(0.05)

    thread = threading.Thread(target=read)
    thread.start()
    here.write(data, 0.3)
    thread.join()
    assert len(got) == len(data)
    with pytest.raises(LinkLost, match="takes nothing"):
        here.write(data, 0.2)
    here.close()
    there.close()


def test_memory_is_taken_for_what_has_come_and_not_for_what_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = joined()
    taken: list[int] = []

    def counted(*args: Any) -> bytearray:
        found = bytearray(*args)
        taken.append(len(found))
        return found

    monkeypatch.setattr(wire, "bytearray", counted, raising=False)
    here.write(struct.pack(">I", wire.MOST_BYTES) + b"x", 1)
    with pytest.raises(LinkLost, match="nothing was heard"):
        there.receive(0.1)
    assert max(taken) <= wire.PIECE
    here.close()
    there.close()


def test_the_first_frame_is_short_and_comes_at_once() -> None:
    here, there = joined()
    here.write(struct.pack(">I", wire.MOST_ASKED + 1), 1)
    with pytest.raises(LinkLost, match="longer than"):
        there.receive_first(1)
    ended = threading.Event()
    threading.Thread(target=dripping, args=(here.sock, ended, b"\0"), daemon=True).start()
    here.write(struct.pack(">I", 1000), 1)
    with pytest.raises(LinkLost, match="nothing was heard"):
        there.receive_first(0.3)
    ended.set()
    here.close()
    there.close()


# the port of transfers


def test_connections_that_say_nothing_are_few_and_let_others_in_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "MOST_NEW", 4)
    monkeypatch.setattr(rooms, "TALK", 0.4)
    guests = [socket.create_connection(("127.0.0.1", port_of(pair)), 2) for _ in range(12)]
    assert all(closed_by_peer(sock, 3) for sock in guests)
    until(lambda: pair.rooms._links == pair.rooms._new == 0)  # pyright: ignore[reportPrivateUsage]
    pair.both("a", PROMPT)
    pair.run()
    assert pair.decode.tokens["a"] == pair.decode.expected(PROMPT, 8, 0)
    assert pair.arrivals.state()["rooms_fetched"] == 1


def test_a_thread_that_cannot_be_had_costs_one_connection(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def none(*_: Any) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(pair.rooms, "_thread", none)
        with socket.create_connection(("127.0.0.1", port_of(pair)), 2) as sock:
            assert closed_by_peer(sock, 3)
    pair.both("a", PROMPT)
    pair.run()
    assert pair.arrivals.state()["rooms_fetched"] == 1


def test_another_version_of_the_protocol_is_told_so(pair: Pair) -> None:
    pair.to_prefill("a", PROMPT)
    until(lambda: "a" in pair.prefill.finish, pair.prefill)
    link = Link(TRANSPORTS.get("tcp")().connect(pair.rooms.addresses["tcp"], "127.0.0.1", 2))
    digest = digest_of(np.array(PROMPT, np.int32))
    link.send(Ask("a/0", digest, 0, 10, {**FACTS, "weight_version": "1"}, wire.VERSION + 1), 2)
    found = link.receive(3)
    link.close()
    assert isinstance(found, Refused) and "version" in found.reason
    pair.to_decode("a", PROMPT)
    pair.run()


def test_a_server_that_ends_accepts_nobody(pair: Pair) -> None:
    port = port_of(pair)
    pair.rooms.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1).close()


# the bootstrap server


@pytest.fixture
def served() -> Iterator[Bootstrap]:
    made = Bootstrap("127.0.0.1", 0, Directory({"page_size": 16}, {"rank_ip": "1.2.3.4", "rank_port": 5}))
    yield made
    made.close()


def asked(served: Bootstrap, method: str = "GET", path: str = "/health", body: Any = None) -> int:
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=3)
    try:
        link.request(method, path, None if body is None else json.dumps(body))
        return link.getresponse().status
    finally:
        link.close()


def test_slow_and_silent_guests_of_the_bootstrap_server_do_not_stay(
    served: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "VISIT", 0.5)
    ended, guests = threading.Event(), list[socket.socket]()
    for number in range(6):
        sock = socket.create_connection(("127.0.0.1", served.port), 2)
        sock.sendall(b"GET /health HTTP/1.1\r\nx: ")
        if number % 2:
            threading.Thread(target=dripping, args=(sock, ended), daemon=True).start()
        guests.append(sock)
    assert all(closed_by_peer(sock, 3) for sock in guests)
    ended.set()
    assert asked(served) == 200


def test_many_guests_of_the_bootstrap_server_do_not_keep_others_out(
    served: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "MOST_GUESTS", 5)
    before = threading.active_count()
    guests = [socket.create_connection(("127.0.0.1", served.port), 2) for _ in range(30)]
    assert asked(served) == 200
    assert all(closed_by_peer(sock, 3) for sock in guests[:20])
    assert threading.active_count() <= before + 6
    for sock in guests:
        sock.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/route", {"attn_tp_rank": 1, "rank_ip": "x" * 1000, "rank_port": 5}),
        ("/route", {"attn_tp_rank": 1, "rank_ip": "1.2.3.4", "rank_port": -1}),
        ("/route", {"attn_tp_rank": 1, "rank_ip": "1.2.3.4", "rank_port": 10**300}),
        ("/register_dp_rank", {"bootstrap_room": 10**300, "dp_rank": 0}),
        ("/register_dp_rank", {"bootstrap_room": -1, "dp_rank": 0}),
        ("/register_dp_rank", {"bootstrap_room": 1, "dp_rank": 10**300}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_registered_is_small(served: Bootstrap, path: str, body: dict[str, Any]) -> None:
    assert asked(served, "PUT" if path == "/route" else "POST", path, body) == 400


# where decode fetches from


def test_a_bootstrap_server_that_answers_byte_by_byte_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "ANSWER", 0.5)
    server, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve() -> None:
        sock, _ = server.accept()
        sock.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
        dripping(sock, ended, b" ")

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(Unknown):
        Book([]).find("127.0.0.1", server.getsockname()[1])
    ended.set()
    server.close()


@pytest.mark.parametrize(
    "host", ["a b", "a\nWARNING all is well", "a\0b", "evil@127.0.0.1", "h/path", "h?q", "h#f", "", "x" * 256]
)
def test_hosts_that_are_none_are_refused(host: str) -> None:
    class Body:
        bootstrap_host: Any = host
        bootstrap_port: Any = 1
        bootstrap_room: Any = 1

    with pytest.raises(BadRequest, match="bootstrap_host"):
        meetings(Body(), 1)


@pytest.mark.parametrize(
    ("host", "found"), [("[::1]", "::1"), ("::1", "::1"), ("a.b-c", "a.b-c"), ("10.0.0.1", "10.0.0.1")]
)
def test_hosts_are_taken_as_they_stand_in_urls(host: str, found: str) -> None:
    class Body:
        bootstrap_host: Any = host
        bootstrap_port: Any = 1
        bootstrap_room: Any = 1

    assert meetings(Body(), 1)[0].host == found


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_a_bootstrap_server_has_an_address_of_the_newer_kind_too() -> None:
    made = Bootstrap("::1", 0, Directory({}, {"phloem": {"machine": "m", "addresses": {"tcp": "::1|5"}}}))
    try:
        assert Book([]).find("::1", made.port).addresses == {"tcp": "::1|5"}
    finally:
        made.close()


def prefill_that(talks: Callable[[Link, Ask], None]) -> Bootstrap:
    """A bootstrap server that names a prefill server which says this to the first who asks."""
    sock, address = TRANSPORTS.get("tcp")().listen("127.0.0.1")

    def serve() -> None:
        link = Link(sock.accept()[0])
        ask = link.receive(5)
        assert isinstance(ask, Ask)
        talks(link, ask)
        time.sleep(0.2)
        link.close()
        sock.close()

    threading.Thread(target=serve, daemon=True).start()
    return Bootstrap(
        "127.0.0.1", 0, Directory({}, {"phloem": {"machine": machine_id(), "addresses": {"tcp": address}}})
    )


@pytest.mark.parametrize(
    "done",
    [
        Done(10**9, "1"),
        Done(-1, "1"),
        Done(5, "1", cached=-3),
        Done(5, "1", logprobs=[Position(-0.5, top=[(-0.5, 10**9)])]),
        Done(5, "1", prompt_logprobs=[Position(-0.5, chosen=[(-0.5, -7)])]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_tokens_that_the_model_does_not_have_are_not_taken(pair: Pair, done: Done) -> None:
    def talk(link: Link, ask: Ask) -> None:
        rows = np.zeros((ask.end, pair.arrivals._target.row_bytes), np.uint8)  # pyright: ignore[reportPrivateUsage]
        link.send(Pages(0, ask.end), 2)
        link.write(rows.tobytes(), 2)
        link.send(done, 2)

    server = prefill_that(talk)
    pair.to_decode("a", PROMPT, prefill_port=server.port)
    pair.run()
    server.close()
    assert pair.decode.tokens["a"] == pair.decode.expected(PROMPT, 8, 0)
    assert pair.arrivals.state()["rooms_failed"] == 1
