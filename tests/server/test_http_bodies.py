"""Limits of bodies and headers, over real sockets: time, sum, memory; clients that leave or never speak."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from door import Served, on_loop, open_door, served

from phloem.server.bodies import SMALL, BodyGate, BodyLimits, Budget, has_body
from phloem.server.connections import FreeSockets, SilentConnections

MIB = 2**20
LIMITS = {"header_timeout": 1.0, "body_timeout": 1.0, "max_body_bytes": 8 * MIB, "max_bodies_bytes": 12 * MIB}


@pytest.fixture
def server() -> Iterator[Served]:
    with served(config=LIMITS) as found:
        yield found


def connect(server: Served, data: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    made.sendall(data)
    return made


def post(path: str, length: int, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: a", f"content-length: {length}", *lines, "", ""]).encode()


def answer(made: socket.socket) -> bytes:
    """All that comes until the server closes; a reset is an error."""
    found = b""
    while data := made.recv(65536):
        found += data
    return found


GENERATE = json.dumps({"text": "hi", "sampling_params": {"max_new_tokens": 2}}).encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /generate HTTP/1.1\r\nhost: a\r\nconte",
    ],
)
def test_a_connection_without_a_whole_header_is_closed(server: Served, begun: bytes) -> None:
    with connect(server, begun) as made:
        start = time.monotonic()
        answer(made)
        assert 0.9 < time.monotonic() - start < 6


@pytest.mark.slow
def test_half_a_header_behind_a_request_is_closed_too(server: Served) -> None:
    with connect(server, post("/generate", len(GENERATE)) + GENERATE) as made:
        while b"meta_info" not in made.recv(65536):
            pass
        made.sendall(b"GET /health HT")
        start = time.monotonic()
        answer(made)
        assert 0.9 < time.monotonic() - start < 6


FLOODS = {
    "one field without end": (b"GET /health HTTP/1.1\r\nhost: a\r\nx: ", b"x" * 50_000),
    "fields without end": (b"GET /health HTTP/1.1\r\nhost: a\r\n", b"x: " + b"y" * 500 + b"\r\n"),
    "a path without end": (b"GET /", b"x" * 50_000),
    "trailers": (b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("flood", FLOODS)
def test_a_header_without_end_is_cut_before_it_takes_memory(server: Served, flood: str) -> None:
    begun, more = FLOODS[flood]
    made = connect(server, begun)
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 16 * MIB:
            made.sendall(more * (1 + 100_000 // len(more)))
            sent += len(more)
            time.sleep(0.001)
    assert sent < 16 * MIB
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("size", [40_000, 70_000])
def test_a_header_over_64_kib_is_answered_431(server: Served, size: int) -> None:
    made = connect(server, b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx: " + b"x" * size + b"\r\n\r\n")
    assert answer(made).startswith(b"HTTP/1.1 200" if size < 65_536 else b"HTTP/1.1 431")


@pytest.mark.slow
def test_connections_that_work_are_left_alone(server: Served) -> None:
    with httpx.Client(base_url=server.url) as http:
        for _ in range(4):
            assert http.get("/health").status_code == 200
            time.sleep(0.7)
    assert not server.engine.submits


@pytest.mark.slow
def test_a_body_that_stops_is_answered_408(server: Served) -> None:
    for head in (post("/generate", 1000), b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"):
        with connect(server, head + b'2\r\n{"') as made:
            found = answer(made)
            assert found.startswith(b"HTTP/1.1 408 ") and b"connection: close" in found and b"body_timeout" in found


@pytest.mark.slow
def test_a_body_that_drips_is_cut_too(server: Served) -> None:
    with connect(server, post("/generate", 1000)) as made:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 10:
                made.sendall(b" ")
                time.sleep(0.2)
        assert time.monotonic() - start < 6


@pytest.mark.slow
def test_all_bodies_together_have_a_budget(server: Served) -> None:
    """Two long halves fit, the third is too much; short bodies go on being served; all is free again afterwards."""
    halves = [connect(server, post("/generate", 7 * MIB) + b" " * (5 * MIB)) for _ in range(2)]
    time.sleep(0.2)
    long = GENERATE.ljust(6 * MIB)
    refused = httpx.post(f"{server.url}/generate", content=long, timeout=20)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "bodies_full"
    assert refused.headers["retry-after"]
    assert httpx.post(f"{server.url}/generate", content=GENERATE.ljust(SMALL), timeout=20).status_code == 200
    for half in halves:
        assert b" 408 " in answer(half)[:20]
        half.close()
    assert httpx.post(f"{server.url}/generate", content=long, timeout=20).status_code == 200


def test_a_client_that_leaves_inside_its_body_is_one_line(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "phloem.server")
    for path in ("/generate", "/v1/chat/completions", "/flush_cache", "/nowhere"):
        caplog.clear()
        connect(server, post(path, 9000) + b" " * 100).close()
        end = time.monotonic() + 5
        while not caplog.records and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.05)
        (record,) = caplog.records
        assert record.levelno == logging.INFO and record.exc_info is None
        assert "left" in record.getMessage() and path in record.getMessage()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/flush_cache", 400),
        ("POST", "/v1/responses/resp_x/cancel", 404),
        ("DELETE", "/v1/responses/resp_x", 404),
        ("GET", "/health", 200),
        ("POST", "/health", 405),
        ("POST", "/nowhere", 404),
        ("POST", "/metrics", 405),
    ],
)
def test_a_body_that_no_route_wants_resets_no_connection(server: Served, method: str, path: str, status: int) -> None:
    size = 6 * MIB
    head = post(path, size, "connection: close").replace(b"POST", method.encode(), 1)
    with connect(server, head) as made:
        made.sendall(b"x" * size)
        assert answer(made).startswith(b"HTTP/1.1 %d " % status)


def test_a_body_without_the_key_resets_no_connection() -> None:
    with served(config={**LIMITS, "api_key": "k"}) as server, connect(server, post("/generate", 6 * MIB)) as made:
        made.sendall(b"x" * (6 * MIB))
        made.shutdown(socket.SHUT_WR)
        assert answer(made).startswith(b"HTTP/1.1 401 ")


@on_loop
async def test_a_body_is_let_go_once_it_is_decoded() -> None:
    """While the answer is made nothing of the budget is held."""
    budgets: list[Budget] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        assert len(body) == MIB and gate.budget.held == MIB - SMALL
        del body
        asking = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        assert gate.budget.held == 0
        budgets.append(gate.budget)
        asking.cancel()

    gate = BodyGate(app, BodyLimits(2 * MIB, 2 * MIB, 5.0))
    parts = [{"type": "http.request", "body": b"x" * (MIB // 4), "more_body": at < 3} for at in range(4)]

    async def receive() -> Any:
        if parts:
            return parts.pop(0)
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "headers": [(b"transfer-encoding", b"chunked")], "method": "POST", "path": "/"}
    await gate(scope, receive, send)
    assert budgets and gate.budget.held == 0


def test_what_has_a_body() -> None:
    for headers, expected in (
        ([], False),
        ([(b"content-length", b"0")], False),
        ([(b"content-length", b"1")], True),
        ([(b"transfer-encoding", b"chunked")], True),
    ):
        assert has_body({"headers": headers}) is expected


class _Protocol:
    def __init__(self, cycle: Any = None, kept: Any = None) -> None:
        self.cycle, self.timeout_keep_alive_task, self.closed = cycle, kept, False
        self.transport = self

    def close(self) -> None:
        self.closed = True


class _Cycle:
    def __init__(self, complete: bool) -> None:
        self.response_complete = complete


def test_only_connections_that_wait_for_a_header_are_closed() -> None:
    silent, half = _Protocol(), _Protocol(_Cycle(True))
    busy, idle = _Protocol(_Cycle(False)), _Protocol(_Cycle(True), kept=object())
    lively = _Protocol(_Cycle(True))
    watch, every = SilentConnections(10.0), [silent, half, busy, idle, lively]
    for second in range(12):
        lively.cycle = _Cycle(True)  # another request each time
        watch.close(every, float(second))
    assert [item.closed for item in every] == [True, True, False, False, False]


def test_running_out_of_files_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "phloem.server")
    look = FreeSockets()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    look.look(3)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        look.look(3)
        look.look(4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    look.look(3)
    look.look(3)
    error, over = caplog.records
    assert error.levelno == logging.ERROR and "ulimit -n" in error.getMessage() and "3 are open" in error.getMessage()
    assert over.levelno == logging.INFO


@on_loop
async def test_the_budget_is_at_least_one_body() -> None:
    async with open_door(max_body_bytes=MIB, max_bodies_bytes=10) as door:
        assert (await door.http.post("/generate", content=GENERATE.ljust(MIB))).status_code == 200
