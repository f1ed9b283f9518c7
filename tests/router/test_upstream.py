"""Answers of a server, read in whatever pieces they come."""

from __future__ import annotations

import itertools
import random

import pytest

from phloem.router.upstream import Connection, Exchange, Pool

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: %b\r\n\r\n"


class Client:
    """A client's connection that takes all, or nothing while it is `full`; what it has been sent, chunk by chunk."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.full = False

    def __call__(self, data: bytes) -> bool:
        if not self.full:
            self.sent.append(b"%x\r\n%b\r\n" % (len(data), data))
        return not self.full


class Silent:
    """A transport to a server that says nothing by itself."""

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def write(self, data: bytes) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def opened() -> tuple[Connection, Exchange, Silent]:
    pool, transport = Pool("127.0.0.1", 1, 1.0), Silent()
    connection, exchange = Connection(pool), Exchange(0.0)
    connection.connection_made(transport)  # type: ignore[arg-type]
    connection.begin(exchange, b"", b"")
    return connection, exchange, transport


def unframed(data: bytes) -> bytes:
    """What chunks hold, read as strictly as can be."""
    whole = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        assert size.isalnum() and rest[int(size, 16) :].startswith(b"\r\n")
        whole, data = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return whole


def pieces_of(data: bytes, borders: list[int], rng: random.Random) -> list[bytes]:
    """`data` cut anywhere, often at borders of chunks."""
    cuts = {at for at in borders if rng.random() < 0.7} | {rng.randrange(len(data)) for _ in range(rng.randrange(12))}
    places = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places) if end > start]


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_the_pieces_the_client_gets_what_was_sent(seed: int) -> None:
    rng = random.Random(seed)
    body, borders, payload = b"", [0], b""
    for _ in range(rng.randrange(1, 12)):
        usual = [b"data: {}\n\n", b"5\r\nab\r\n", b"\r\n", b"0\r\n\r\n"]
        part = rng.choice([*usual, rng.randbytes(rng.randrange(1, 300))])
        more = rng.choice([b"", b"", b"", b";x=1"])
        size = b"%x" % len(part) if rng.random() < 0.8 else b"%04X" % len(part)
        body, payload = body + size + more + b"\r\n" + part + b"\r\n", payload + part
        borders.append(len(body))
    body += b"0\r\n" + rng.choice([b"", b"x-trailer: 1\r\n"]) + b"\r\n"
    connection, exchange, transport = opened()
    client = Client()
    pieces = pieces_of(body, borders, rng)
    early = pieces.pop(0) if rng.random() < 0.5 else b""  # comes with the head
    connection.data_received(HEAD % b"chunked" + early)
    if exchange.stuffed and not exchange.done:
        client(exchange.taken())
    exchange.sink = client
    assert exchange.status == 200
    for piece in pieces:
        client.full = rng.random() < 0.2
        connection.data_received(piece)
        client.full = False
        if exchange.stuffed and not exchange.done:
            client(exchange.taken())
    if exchange.stuffed:
        client(exchange.taken())
    assert exchange.done and exchange.error is None and not transport.aborted
    assert unframed(b"".join(client.sent)) == payload and exchange.received == len(payload)
    assert connection.usable


@pytest.mark.parametrize("piece", [b"0x2\r\nab\r\n", b"+2\r\nab\r\n", b"2_\r\nab\r\n", b"2\nab\r\n", b"g\r\n"])
async def test_what_is_no_chunk_is_the_servers_fault(piece: bytes) -> None:
    connection, exchange, transport = opened()
    client = Client()
    connection.data_received(HEAD % b"chunked")
    exchange.sink = client
    connection.data_received(b"2\r\nab\r\n")
    connection.data_received(piece)
    connection.data_received(b"2\r\nab\r\n0\r\n\r\n")
    assert exchange.error is not None and transport.aborted and not exchange.done
    assert b"".join(client.sent) == b"2\r\nab\r\n"


async def test_an_answer_with_a_length_is_never_taken_for_chunks() -> None:
    connection, exchange, _ = opened()
    client = Client()
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n")
    exchange.sink = client
    for _ in range(2):
        connection.data_received(b"2\r\nab\r\n")
    assert exchange.done and exchange.received == 14 and not client.sent[2:]
