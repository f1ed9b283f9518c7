"""Events that go past the response's task: the same bytes, in order, whatever the client does meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from door import make_info, on_loop, served, until

from phloem.client.call import Call
from phloem.client.client import EngineClient
from phloem.client.consumers import Direct
from phloem.client.request import GenerateRequest, Item
from phloem.core.messages import Chunk, Tokens
from phloem.core.request import FinishReason, SamplingParams
from phloem.server import serve as serve_file
from phloem.server.serve import ChunkWriter
from phloem.server.stream import BODY_SEND, BODY_WRITE, EventStream
from phloem.testing.byte_tokenizer import ByteTemplate, ByteTokenizer
from phloem.testing.fake_engine import FakeEngine


class Wire:
    """A connection: what was written, by which way, and whether it takes any more."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.body = b""
        self.direct = 0
        self.ended = self.broken = False

    async def send(self, message: Any) -> None:
        await self.open.wait()
        if self.broken:
            raise OSError("the connection is broken")
        self.body += message.get("body", b"")
        self.ended = message["type"] == "http.response.body" and not message["more_body"]

    def write(self, data: bytes) -> bool:
        if not self.open.is_set() or self.broken:
            return False
        self.body += data
        self.direct += 1
        return True


class Stream:
    """One request over a silent engine, streamed to a `Wire`; the test says what the engine sends."""

    def __init__(self, **sampling: Any) -> None:
        self.wire = Wire()
        self.engine = FakeEngine()
        self.engine.paused = True
        self.client = EngineClient(ByteTokenizer(), ByteTemplate(), make_info())  # type: ignore[arg-type]
        self.client.attach(self.engine)
        self.client.start()
        self.sampling = SamplingParams(**sampling)

    async def begin(self) -> None:
        item = Item(sampling=self.sampling, text="hi", id="a")
        self.call = await self.client.submit(GenerateRequest([item], stream=True))
        self.output = self.call.outputs[0]

        async def events() -> Any:
            async for outputs in self.call:
                self.call.frame = lambda _, text: f"[{text}]".encode() if text else b""
                yield "".join(f"<{output.delta}>" for output in outputs).encode()

        self.say("a")
        made = events()
        first = await anext(made)
        watch = asyncio.create_task(asyncio.sleep(60))
        response = EventStream(self.call, first, made, watch, SimpleNamespace(done=b"!", error=lambda e: b"?"))  # type: ignore[arg-type]
        scope = {BODY_SEND: self.wire.send, BODY_WRITE: self.wire.write}
        self.task = asyncio.create_task(response(scope, self.wire.send, self.wire.send))  # type: ignore[arg-type]
        await until(self.is_direct)
        await asyncio.sleep(0)

    def is_direct(self) -> bool:
        return isinstance(self.output.consumer, Direct)

    def take(self, message: Tokens) -> None:
        self.client.connection._deliver(message)

    def say(self, text: str, finish: FinishReason | None = None) -> None:
        self.take(Tokens(chunks=[Chunk(id="a", tokens=[*text.encode()], finish=finish)]))

    def plain(self, text: str) -> None:
        for token in text.encode():
            self.take(Tokens(rows=["a"], plain=[token]))

    async def end(self) -> None:
        self.say("z", FinishReason("length", length=1))
        await asyncio.wait_for(self.task, 5)
        await self.client.close()


@on_loop
async def test_plain_tokens_never_wake_the_task() -> None:
    stream = Stream()
    await stream.begin()
    stream.plain("bcd")  # no turn of the loop in between
    assert (stream.wire.body, stream.wire.direct) == (b"<a>[b][c][d]", 3)
    stream.say("ef")  # two tokens in one chunk
    assert stream.wire.body.endswith(b"[ef]")
    await stream.end()
    assert stream.wire.body == b"<a>[b][c][d][ef]<z>!" and stream.wire.ended
    assert stream.output.text == "abcdefz" and stream.output.completion_tokens == 7
    counters = stream.client.counters
    assert counters.generation_tokens == 7 and counters.itl.counts and sum(counters.itl.counts) == 6


@on_loop
async def test_a_slow_client_gets_all_in_order_and_nothing_twice() -> None:
    stream = Stream()
    await stream.begin()
    stream.plain("b")
    stream.wire.open.clear()
    stream.take(Tokens(rows=["a", "a", "a"], plain=[*b"cde"]))  # one message: rendered before the first waits
    stream.plain("fg")
    await asyncio.sleep(0.01)
    stream.plain("h")
    assert stream.wire.body == b"<a>[b]"
    stream.wire.open.set()
    await until(lambda: b"h" in stream.wire.body)
    await until(stream.is_direct)
    stream.plain("i")
    await stream.end()
    assert re.sub(rb"[\[\]<>]", b"", stream.wire.body) == b"abcdefghiz!"
    assert stream.wire.body.endswith(b"[i]<z>!") and stream.wire.direct == 2


@on_loop
async def test_a_stream_can_end_while_its_client_is_slow() -> None:
    stream = Stream()
    await stream.begin()
    stream.wire.open.clear()
    stream.plain("bc")
    stream.say("z", FinishReason("length", length=1))
    await asyncio.sleep(0.01)
    stream.wire.open.set()
    await asyncio.wait_for(stream.task, 5)
    assert re.sub(rb"[\[\]<>]", b"", stream.wire.body) == b"abcz!" and stream.wire.ended
    await stream.client.close()


@on_loop
async def test_a_client_that_goes_while_it_is_slow_ends_the_call() -> None:
    stream = Stream()
    await stream.begin()
    stream.wire.open.clear()
    stream.plain("b")
    stream.wire.broken = True
    stream.wire.open.set()
    await asyncio.sleep(0.01)
    stream.plain("c")
    await asyncio.wait_for(stream.task, 5)
    assert stream.wire.body == b"<a>" and stream.client.in_flight == 0
    assert [abort.id for abort in stream.engine.aborts] == ["a"]
    await stream.client.close()


@on_loop
async def test_a_stop_string_is_met_past_the_task_too() -> None:
    stream = Stream(stop=["cd"])
    await stream.begin()
    assert stream.output.consumer.follow is None
    stream.plain("bc")
    assert stream.wire.body == b"<a>[b]"
    stream.plain("d")
    await asyncio.wait_for(stream.task, 5)
    assert stream.wire.body == b"<a>[b]<>!" and stream.output.text == "ab"
    assert [abort.id for abort in stream.engine.aborts] == ["a"]
    stream.plain("e")  # on its way already
    assert stream.output.text == "ab" and stream.client.in_flight == 0
    await stream.client.close()


@on_loop
async def test_what_cannot_be_rendered_ends_that_stream_with_an_error() -> None:
    stream = Stream()
    await stream.begin()
    stream.output.consumer.follow = lambda token: 1 / 0  # type: ignore[assignment, return-value]
    stream.plain("b")
    await asyncio.wait_for(stream.task, 5)
    assert stream.wire.body == b"<a>?" and stream.client.in_flight == 0
    assert [abort.id for abort in stream.engine.aborts] == ["a"]
    await stream.client.close()


@on_loop
async def test_a_row_that_ended_is_not_taken_for_another_of_its_name() -> None:
    stream = Stream()
    await stream.begin()
    stream.take(Tokens(rows=["a", "b"], plain=[*b"b?"]))
    stream.take(Tokens(plain=[*b"c?"]))
    assert stream.output.text == "abc"
    old = stream.output
    stream.client.abort("a")
    await asyncio.wait_for(stream.task, 5)
    again = await stream.client.submit(GenerateRequest([Item(sampling=stream.sampling, text="hi", id="a")], True))
    stream.take(Tokens(plain=[*b"d?"]))  # of the one that ended
    assert old.text == "abc" and again.outputs[0].ids == []
    stream.take(Tokens(rows=["a"], plain=[*b"e"]))
    assert again.outputs[0].ids == [*b"e"]
    await stream.client.close()


def test_only_a_connection_in_a_known_state_is_written_to() -> None:
    written: list[bytes] = []
    cycle: Any = SimpleNamespace(
        flow=SimpleNamespace(write_paused=False),
        transport=SimpleNamespace(write=written.append),
        disconnected=False,
        chunked_encoding=True,
        response_complete=False,
    )
    writer = ChunkWriter(cycle)
    assert writer(b"x" * 17) and written == [b"11\r\n" + b"x" * 17 + b"\r\n"]
    for name, value in (("disconnected", True), ("chunked_encoding", None), ("response_complete", True)):
        before = getattr(cycle, name)
        setattr(cycle, name, value)
        assert not writer(b"y")
        setattr(cycle, name, before)
    cycle.flow.write_paused = True
    assert not writer(b"y") and len(written) == 1
    assert ChunkWriter.of(lambda message: None) is None and ChunkWriter.of([].append) is None


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "hé", "max_tokens": 30, "temperature": 1.0, "seed": 3}),
    ("/generate", {"text": "hé", "sampling_params": {"max_new_tokens": 30, "sampling_seed": 3}}),
    ("/generate", {"text": ["hé"], "sampling_params": {"max_new_tokens": 30, "sampling_seed": 3}}),
    (
        "/generate",
        {"text": "hé", "return_prompt_token_ids": True, "sampling_params": {"max_new_tokens": 9, "stop": "q"}},
    ),
    ("/generate", {"text": "hé", "return_logprob": True, "sampling_params": {"max_new_tokens": 9}}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("incremental", [False, True])
def test_bytes_are_those_that_the_task_would_write(
    path: str, body: dict[str, Any], incremental: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(url: str) -> tuple[int, list[bytes]]:
        """How many parts went straight to the transport, and all parts as they came, but for times."""
        passed.clear()
        with (
            httpx.Client(timeout=60) as http,
            http.stream("POST", url + path, json={**body, "rid": "r", "stream": True}) as got,
        ):
            parts = got.read().split(b"\n\n")
        changing = rb'"(created|e2e_latency)":[0-9.e-]+'
        return len(passed), [re.sub(changing, rb'"\1":0', part) for part in parts]

    passed: list[int] = []
    write = ChunkWriter.__call__
    monkeypatch.setattr(ChunkWriter, "__call__", lambda self, data: passed.append(1) or write(self, data))
    with served(config={"incremental_streaming_output": incremental}, delay=0.001) as server:
        direct, quick = answer(server.url)
        monkeypatch.setattr(Call, "frame", property(lambda self: None, lambda self, frame: None), raising=False)
        none, slow = answer(server.url)
    assert none == 0 and (direct > 5) == ("return_logprob" not in body)
    assert quick == slow and len(quick) > 9


@pytest.mark.slow
def test_a_socket_that_is_not_read_holds_the_stream_back_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cumulative events are large enough to fill a small connection."""
    bind = serve_file.bind

    def small(host: str, port: int) -> socket.socket:
        found = bind(host, port)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return found

    monkeypatch.setattr(serve_file, "bind", small)
    count = 400
    with served() as server:
        body = json.dumps({"text": "a", "stream": True, "sampling_params": {"max_new_tokens": count}}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            head = f"POST /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            time.sleep(0.3)
            data = b""
            while piece := client.recv(65536):
                data += piece
        events = re.findall(rb"data: (\{.*?\})\n\n", data)
        last = json.loads(events[-1])
        assert len(last["output_ids"]) == count and last["meta_info"]["finish_reason"]["type"] == "length"
        texts = [json.loads(event)["text"] for event in events]
        assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
        assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
