"""Streams over a real socket: disconnects, batches, usage, death on the way, draining."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from door import Served, on_loop, open_door, served

from phloem.core.errors import ConfigError
from phloem.server.serve import bind
from phloem.server.stream import TextEvent, event
from phloem.testing.fake_engine import FakeEngine

HI = [{"role": "user", "content": "hi"}]
LONG = {"messages": HI, "max_tokens": 400, "stream": True}
CHAT = "/v1/chat/completions"


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.005)


def hang_up(server: Served, path: str, body: dict[str, Any]) -> None:
    """Ask, and close the connection before an answer, but not before the engine has the request."""
    known = len(server.engine.submits)
    request = httpx.Request("POST", server.url + path, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port)) as wire:
        wire.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        wait_for(lambda: len(server.engine.submits) > known)


@pytest.fixture
def slow() -> Iterator[Served]:
    with served(delay=0.005) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, LONG),
        (CHAT, {**LONG, "n": 3}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 400, "stream": True}),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 400}, "stream": True}),
    ],
)
def test_a_client_that_hangs_up_aborts_exactly_once(slow: Served, path: str, body: dict[str, Any]) -> None:
    with httpx.Client() as http, http.stream("POST", slow.url + path, json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
        assert slow.engine.running
    wait_for(lambda: not slow.engine.running)
    time.sleep(0.05)
    submitted = sorted(submit.id for submit in slow.engine.submits)
    assert sorted(abort.id for abort in slow.engine.aborts) == submitted
    assert slow.client.in_flight == 0


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_before_the_first_token_aborts_too(slow: Served, stream: bool) -> None:
    slow.engine.paused = True
    hang_up(slow, CHAT, {**LONG, "stream": stream})
    wait_for(lambda: len(slow.engine.aborts) == 1)
    assert slow.client.in_flight == 0


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_what_runs_in_the_background_outlives_its_client(stream: bool) -> None:
    with served(delay=0.002) as server:
        key = httpx.post(server.url + "/open_session", json={}).json()
        body = {
            "text": "ab",
            "rid": "left",
            "stream": stream,
            "background": True,
            "sampling_params": {"max_new_tokens": 60},
            "session_params": {"id": key},
        }
        if stream:
            with httpx.Client() as http, http.stream("POST", server.url + "/generate", json=body) as response:
                next(response.iter_lines())
        else:
            httpx.post(server.url + "/pause_generation", json={}).raise_for_status()
            hang_up(server, "/generate", body)
            time.sleep(0.05)  # the server's time to see it
            assert server.client.in_flight == 1
            httpx.post(server.url + "/continue_generation", json={}).raise_for_status()
        wait_for(lambda: server.client.in_flight == 0)
        assert server.engine.aborts == [] and server.client.counters.requests == 1
        on = {"text": "c", "sampling_params": {"max_new_tokens": 1}, "session_params": {"id": key, "rid": "left"}}
        answer = httpx.post(server.url + "/generate", json=on).json()
        assert answer["meta_info"]["prompt_tokens"] == 3 + 60 + 1


def test_what_runs_in_the_background_can_be_ended_by_its_id(slow: Served) -> None:
    body = {"text": "ab", "rid": "left", "background": True, "sampling_params": {"max_new_tokens": 400}}
    slow.engine.paused = True
    hang_up(slow, "/generate", body)
    time.sleep(0.05)  # the server's time to see it
    assert slow.client.in_flight == 1
    assert httpx.post(slow.url + "/abort_request", json={"rid": "left"}).json()["message"] == "1 aborted"
    wait_for(lambda: slow.client.in_flight == 0)


def test_a_finished_request_is_never_aborted(slow: Served) -> None:
    for stream in (False, True):
        response = httpx.post(slow.url + CHAT, json={"messages": HI, "max_tokens": 3, "stream": stream})
        assert response.status_code == 200
    time.sleep(0.05)
    assert slow.engine.aborts == []


@pytest.mark.slow
def test_tokens_arrive_as_they_are_made() -> None:
    with served(delay=0.03) as server, httpx.Client() as http:
        times: list[float] = []
        with http.stream("POST", server.url + CHAT, json={**LONG, "max_tokens": 8}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.monotonic())
        assert times[-1] - times[0] > 0.1


@on_loop
async def test_chat_stream_has_roles_indices_and_one_end_per_choice() -> None:
    async with open_door() as door:
        events = await door.events(CHAT, {**LONG, "max_tokens": 6, "n": 3, "seed": 5})
        assert events[-1] == "[DONE]"
        chunks = [json.loads(data) for data in events[:-1]]
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in chunks)
        whole = (await door.post(CHAT, {**LONG, "max_tokens": 6, "n": 3, "seed": 5, "stream": False})).json()
        for index in range(3):
            mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(choice["delta"].get("content", "") for choice in mine)
            assert text == whole["choices"][index]["message"]["content"]
            assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1]["finish_reason"] == "length" and mine[-1]["delta"] == {}


@on_loop
async def test_usage_comes_last_or_always() -> None:
    async with open_door() as door:
        body = {**LONG, "max_tokens": 4, "stream_options": {"include_usage": True}}
        chunks = [json.loads(data) for data in (await door.events(CHAT, body))[:-1]]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 4 and chunks[-1]["usage"]["prompt_tokens"] == 6
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        chunks = [json.loads(data) for data in (await door.events(CHAT, body))[:-1]]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 4
        completion = {"prompt": "a", "max_tokens": 3, "stream_options": {"continuous_usage_stats": True}}
        chunks = [json.loads(data) for data in (await door.events("/v1/completions", completion))[:-1]]
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
        chunks = [json.loads(data) for data in (await door.events(CHAT, {**body, "n": 2}))[:-1]]
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {6}
        assert chunks[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, "/generate"])
def test_engine_death_on_the_way_is_an_error_event_and_then_the_end(slow: Served, path: str) -> None:
    body = LONG if path == CHAT else {"text": "a", "sampling_params": {"max_new_tokens": 400}, "stream": True}
    with httpx.Client() as http, http.stream("POST", slow.url + path, json=body) as response:
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
        slow.call(slow.engine.die, "killed by signal 9")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ("killed by signal 9", "engine_unavailable")
    assert error["retryable"] is True
    assert httpx.get(slow.url + "/health").status_code == 503
    slow.call(slow.client.attach, FakeEngine())
    wait_for(lambda: slow.client.connection.ready is not None)
    assert httpx.get(slow.url + "/health").status_code == 200
    assert httpx.post(slow.url + CHAT, json={"messages": HI, "max_tokens": 2}).status_code == 200


def test_a_refused_stream_is_answered_with_its_status() -> None:
    with served(refuse_all=(503, "the queue is full")) as server:
        response = httpx.post(server.url + CHAT, json=LONG)
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["error"]["message"] == "the queue is full"


@pytest.mark.slow
def test_many_streams_of_which_a_quarter_hang_up() -> None:
    """Every survivor gets its whole answer; nothing stays in flight."""
    count, tokens = 60, 25
    dice = random.Random(1)
    quitters = {number for number in range(count) if dice.random() < 0.25}

    async def one(http: httpx.AsyncClient, number: int) -> int:
        body = {**LONG, "max_tokens": tokens, "seed": number}
        events = 0
        async with http.stream("POST", CHAT, json=body) as response:
            async for line in response.aiter_lines():
                events += line.startswith("data: ")
                if number in quitters and events > 5:
                    return 0
        return events

    async def main(url: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=count), timeout=30) as http:
            return await asyncio.gather(*(one(http, number) for number in range(count)))

    with served(delay=0.002) as server:
        for _ in range(2):
            results = asyncio.run(main(server.url))
            # role, tokens, finish, [DONE]
            assert {result for number, result in enumerate(results) if number not in quitters} == {tokens + 3}
            wait_for(lambda: not server.engine.running)
            assert server.client.in_flight == 0
        aborted = [abort.id for abort in server.engine.aborts]
        assert len(aborted) == len(set(aborted)) <= 2 * len(quitters)


@pytest.mark.slow
def test_stopping_lets_running_requests_finish_and_refuses_new_ones() -> None:
    box: dict[str, Any] = {}
    with served(config={"drain_timeout": 10}, delay=0.01) as server:
        url = server.url
        body = {"messages": HI, "max_tokens": 60}

        def ask() -> None:
            box["answer"] = httpx.post(url + CHAT, json=body, timeout=20)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: server.client.in_flight == 1)
        with httpx.Client() as http:
            assert http.get(url + "/health").status_code == 200
            server.stop()
            wait_for(lambda: server.client.draining)
            refused = http.post(url + CHAT, json=body)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert http.get(url + "/health").status_code == 503
    thread.join(10)
    assert box["answer"].json()["usage"]["completion_tokens"] == 60
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def test_stopping_ends_what_outlives_the_drain() -> None:
    box: dict[str, Any] = {}
    with served(config={"drain_timeout": 0.1}, delay=0.02) as server:

        def ask(url: str) -> None:
            box["answer"] = httpx.post(url + CHAT, json={"messages": HI, "max_tokens": 400}, timeout=20)

        thread = threading.Thread(target=ask, args=(server.url,))
        thread.start()
        wait_for(lambda: server.client.in_flight == 1)
    thread.join(10)
    assert box["answer"].json()["choices"][0]["finish_reason"] == "abort"


def test_bind_explains_what_is_wrong() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use") as caught:
            bind("127.0.0.1", port)
        assert caught.value.param == "port"
    with pytest.raises(ConfigError, match="no address of this machine") as caught:
        bind("203.0.113.7", 0)
    assert caught.value.param == "host"
    with pytest.raises(ConfigError, match="host"):
        bind("not a host", 0)
    free = bind("127.0.0.1", 0)
    assert free.getsockname()[1] > 0
    free.close()


@pytest.mark.slow
def test_a_body_over_the_limit_on_a_real_socket() -> None:
    with served() as server:
        response = httpx.post(server.url + "/generate", content=b" " * 50_000_000, timeout=20)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"

        def pieces() -> Iterator[bytes]:
            for _ in range(50):
                yield b" " * 1_000_000

        assert httpx.post(server.url + "/generate", content=pieces(), timeout=20).status_code == 413
        assert httpx.post(server.url + CHAT, json={"messages": HI, "max_tokens": 1}).status_code == 200


@pytest.mark.some(4)
@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"stream_options": {"include_usage": True}}, {"n": 2}, {"stop": ["zz"]}])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI}),
        ("/v1/completions", {"prompt": "hé"}),
        ("/v1/completions", {"prompt": "hé", "echo": True}),
    ],
)
def test_events_from_a_frame_are_those_encoded_whole(
    path: str, body: dict[str, Any], more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written around a text once is byte for byte what encoding each event gives."""

    def answer(server: Served) -> list[str]:
        asked = {**body, **more, "max_tokens": 30, "temperature": 1.0, "seed": 3, "rid": "same", "stream": True}
        text = httpx.post(server.url + path, json=asked).text
        return sorted(re.sub(r'"created":\d+', '"created":0', text).split("\n\n"))

    with served() as server:
        framed = answer(server)
        made: list[int] = []
        monkeypatch.setattr("phloem.server.chunks._text_event", lambda *_: made.append(1) or _Whole(*_))
        whole = answer(server)
    assert made and framed == whole and len(framed) > 25


class _Whole:
    """A `TextEvent` that encodes everything each time."""

    def __init__(self, plain: Any, output: Any, final: bool) -> None:
        self.made = lambda text: plain(output, text)
        self.final = final

    def __call__(self, text: str) -> bytes:
        chunk = self.made(text)
        if self.final:
            chunk.usage = None
        return event(chunk)


def test_a_frame_writes_any_text() -> None:
    write = TextEvent(lambda text: {"a": 'b"\\', "text": text, "z": [None]})
    for text in ('"', "\\", "\n\t\x00\x1f\x7f", "é\u2028😀", "data: x\n\n", ""):
        assert write(text) == event({"a": 'b"\\', "text": text, "z": [None]})
