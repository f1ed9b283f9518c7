"""The client, the workloads and the figures of `phloem bench serving`, against a server over a fake engine."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from door import served

from phloem.bench import serving
from phloem.bench._client import Client, Result, Target, run_workload
from phloem.bench._report import percentile, plot, print_table, summarise, write_line
from phloem.bench._text import Texts, sentences
from phloem.bench._workloads import WORKLOADS, Session, Sizes, Turn, Workload
from phloem.core.errors import BadRequest
from phloem.testing.byte_tokenizer import ByteTokenizer
from phloem.testing.checkpoints import tiny_checkpoint


def test_percentiles_interpolate() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    assert percentile([7.0], 0.99) == 7.0
    assert math.isnan(percentile([], 0.5))


def result(start: float, first: float, end: float, tokens: int, **more: Any) -> Result:
    return Result(start, first, end, input_tokens=100, output_tokens=tokens, **more)


def test_a_summary_of_known_times() -> None:
    found = summarise(
        "x",
        [
            result(0.0, 0.1, 1.1, 11, cached_tokens=50, gaps=[0.1] * 10),
            result(0.0, 0.3, 2.3, 21, gaps=[0.1] * 20),
            Result(0.0, error="HTTP 500: no"),
        ],
        seconds=4.0,
    )
    assert (found["requests"], found["failed"], found["errors"]) == (3, 1, ["HTTP 500: no"])
    assert found["output_tok_per_s"] == 8.0 and found["input_tok_per_s"] == 50.0 and found["requests_per_s"] == 0.5
    assert found["ttft_ms"]["mean"] == pytest.approx(200) and found["ttft_ms"]["p50"] == pytest.approx(200)
    assert found["tpot_ms"]["mean"] == pytest.approx(100) and found["decode_tok_per_s"] == pytest.approx(10)
    assert found["itl_ms"]["p99"] == pytest.approx(100)
    assert found["prefill_tok_per_s"] == pytest.approx((1000 + 1000 / 3) / 2)
    assert found["cache_hit_rate"] == 0.25


def test_a_summary_of_failures_alone() -> None:
    found = summarise("x", [Result(0.0, error="a"), Result(0.0, error="b")], 1.0)
    assert found["failed"] == 2 and found["errors"] == ["a", "b"] and found["output_tok_per_s"] == 0
    assert found["ttft_ms"] == {} and found["cache_hit_rate"] == 0
    print_table([found], "nothing came")


def test_one_token_has_no_time_per_token() -> None:
    assert result(0.0, 0.5, 0.5, 1).tpot is None and summarise("x", [result(0.0, 0.5, 0.5, 1)], 1.0)["tpot_ms"] == {}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))
    return serving.load_encoder(str(path))


def test_texts_have_their_length_and_begin_differently(bpe: Any) -> None:
    assert len(sentences()) > 1000
    texts = Texts(bpe, 1)
    drawn = [texts.draw(count) for count in (32, 32, 64, 300)]
    for text, count in zip(drawn, (32, 32, 64, 300), strict=True):
        assert abs(len(bpe.encode(text, add_special_tokens=False)) - count) <= 1
    assert len({text[:16] for text in drawn}) == len(drawn)
    assert Texts(bpe, 1).draw(32) == drawn[0] != Texts(bpe, 2).draw(32)


@pytest.mark.parametrize(
    ("name", "sessions", "turns", "concurrency", "tokens", "output"),
    [
        ("single", 3, 1, 1, 32, 256),
        ("prefill", 6, 1, 1, 1800, 1),
        ("throughput", 64, 1, 32, 256, 128),
        ("conversations", 8, 6, 8, 64, 64),
    ],
)
def test_workloads_by_default(
    name: str, sessions: int, turns: int, concurrency: int, tokens: int, output: int, bpe: Any
) -> None:
    load = WORKLOADS[name](Texts(bpe, 1), Sizes())
    assert (len(load.sessions), load.concurrency, load.greedy) == (sessions, concurrency, True)
    for session in load.sessions:
        assert len(session.turns) == turns and {turn.output_tokens for turn in session.turns} == {output}
    assert abs(len(bpe.encode(load.sessions[0].turns[0].text, add_special_tokens=False)) - tokens) <= 1


def test_shared_prefixes_are_interleaved(bpe: Any) -> None:
    load = WORKLOADS["shared-prefix"](Texts(bpe, 1), Sizes(input_tokens=200))
    texts = [session.turns[0].text for session in load.sessions]
    assert len(texts) == 64 and load.concurrency == 16
    assert texts[0][:100] == texts[8][:100] != texts[1][:100]
    assert len(set(texts)) == 64
    tokens = len(bpe.encode(texts[0], add_special_tokens=False))
    assert abs(tokens - 232) <= 3  # the joint may cost a token


def load_of(*sessions: Session, concurrency: int = 8, **more: Any) -> Workload:
    return Workload("test", list(sessions), concurrency, **more)


async def run(client: Client, load: Workload) -> list[Result]:
    seen: list[Result] = []
    results, seconds = await run_workload(client, load, seen.append)
    await client.close()
    assert seen == results and seconds > 0
    return results


@pytest.mark.parametrize("api", ["completions", "generate"])
async def test_the_client_counts_what_the_server_sent(api: str) -> None:
    with served() as server:
        url = server.url
        load = load_of(*(Session([Turn(f"Hello {i}", 6)]) for i in range(5)), concurrency=2)
        results = await run(Client(Target(url, "tiny", api)), load)
    assert [item.error for item in results] == [""] * 5
    assert all(item.output_tokens == 6 and item.input_tokens >= 7 and len(item.text) == 6 for item in results)
    assert all(item.start < item.first <= item.end and len(item.gaps) <= 5 for item in results)


async def test_a_fresh_client_survives_a_server_that_hangs_up() -> None:
    """The server says nothing of closing, and closes after each answer, as some do."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.split(b"\r\n") if b"content-length" in line.lower()).split(b":")[1])
        await reader.readexactly(length)
        event = b'data: {"choices": [{"text": "a"}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(event) + event)
        await writer.drain()
        await reader.read(1)  # until the client closes or asks again
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    load = load_of(Session([Turn("x", 1)] * 3))
    async with server:
        fresh = await run(Client(Target(f"http://127.0.0.1:{port}", "m"), fresh=True), load)
        assert connections == 3
        kept = await run(Client(Target(f"http://127.0.0.1:{port}", "m")), load)
    assert [item.error for item in fresh] == [""] * 3 and [item.text for item in fresh] == ["a"] * 3
    assert any(item.error for item in kept)


@pytest.mark.slow
async def test_a_conversation_sends_all_that_was_said() -> None:
    with served() as server:
        url = server.url
        load = load_of(Session([Turn("One", 4), Turn(" two", 4), Turn(" three", 4)]))
        results = await run(Client(Target(url, "tiny")), load)
    # Byte tokens: each prompt is longer by the answer before it and by what was added.
    grown = [b.input_tokens - a.input_tokens for a, b in itertools.pairwise(results)]
    assert grown == [4 + len(" two"), 4 + len(" three")]


async def test_errors_are_results() -> None:
    with served() as server:
        url = server.url
        refused = await run(Client(Target(url, "tiny")), load_of(Session([Turn("x" * 2000, 4)])))
        missing = await run(Client(Target(url + "/nowhere", "tiny")), load_of(Session([Turn("x", 4)])))
    gone = await run(Client(Target("http://127.0.0.1:9", "tiny")), load_of(Session([Turn("x", 4)])))
    assert refused[0].error.startswith("HTTP 400") and missing[0].error.startswith("HTTP 404")
    assert "Connect" in gone[0].error
    assert summarise("x", [*refused, *missing, *gone], 1.0)["failed"] == 3


async def test_an_error_within_the_stream_and_a_stream_of_rubbish() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        bad = b"rubbish" in request
        event = b"data: {not json\n\n" if bad else b'data: {"error": {"message": "lost"}}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + event)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    async with server:
        told = await run(Client(Target(url, "m")), load_of(Session([Turn("x", 1)])))
        rubbish = await run(Client(Target(url + "/rubbish", "m")), load_of(Session([Turn("x", 1)])))
    assert "lost" in told[0].error and "JSONDecodeError" in rubbish[0].error


async def _answering(*parts: bytes, pause: float = 0.0) -> asyncio.Server:
    """A server that reads a request, writes these bytes one after the other, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


async def _asked(server: asyncio.Server, **options: Any) -> Result:
    async with server:
        port = server.sockets[0].getsockname()[1]
        client = Client(Target(f"http://127.0.0.1:{port}", "m", **options), fresh=True)
        (result,) = await run(client, load_of(Session([Turn("x", 1)])))
        return result


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


async def test_an_event_counts_when_it_is_complete_however_it_was_cut() -> None:
    one, two = (b'data: {"choices": [{"text": "%s"}]}\n\n' % text for text in ("ä".encode(), b"b"))
    role = b'data: {"choices": [{"text": ""}]}\r\n\r\n: a comment\n\n'
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
    parts = [CHUNKED, chunk(role), chunk(one[:33]), chunk(one[33:]), chunk(two + usage), b"0\r\n\r\n"]
    began = asyncio.get_running_loop().time()
    found = await _asked(await _answering(*parts, pause=0.02))
    assert (found.error, found.text, found.input_tokens, found.output_tokens) == ("", "äb", 5, 2)
    assert found.ttft >= 0.06 and len(found.gaps) == 1 and found.gaps[0] >= 0.015
    assert found.end - found.first == pytest.approx(found.gaps[0])
    assert asyncio.get_running_loop().time() - began < 5


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([CHUNKED, chunk(b'data: {"choices": [{"text": "a"}]}\n\n')], "ended before the answer"),
        ([HEAD + b"Content-Length: 100\r\n\r\ndata: {}"], "ended before the answer"),
        ([], "ended before the answer"),
        ([b"SSH-2.0-x\r\n\r\n"], "no valid HTTP"),
        ([b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull"], "HTTP 503: full"),
    ],
)
async def test_what_is_no_whole_answer_is_an_error(parts: list[bytes], error: str) -> None:
    found = await _asked(await _answering(*parts))
    assert error in found.error


async def test_an_answer_may_end_with_its_connection_or_follow_an_interim_one() -> None:
    event = b'data: {"choices": [{"text": "a"}]}\n\n'
    closed = await _asked(await _answering(HEAD + b"\r\n", event))
    assert (closed.error, closed.text) == ("", "a")
    interim = await _asked(await _answering(b"HTTP/1.1 100 Continue\r\n\r\n", CHUNKED, chunk(event), b"0\r\n\r\n"))
    assert (interim.error, interim.text) == ("", "a")


async def test_connections_are_used_again_unless_fresh() -> None:
    with served() as server:
        client = Client(Target(server.url, "tiny"))
        for _ in range(3):
            assert not (await client.ask("x", 2, True)).error
            assert len(client._http._idle) == 1
        assert (await client.get("/v1/models"))["data"] and await client.get("/nowhere") is None
        assert await client.post("/flush_cache") == 200
        await client.close()
        fresh = Client(Target(server.url, "tiny"), fresh=True)
        assert not (await fresh.ask("x", 2, True)).error and not fresh._http._idle


async def test_concurrency_is_a_limit_and_rate_spreads_arrivals() -> None:
    class Slow(Client):
        now = most = 0

        async def ask(self, prompt: str, output_tokens: int, greedy: bool) -> Result:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.01)
            self.now -= 1
            return Result(0.0)

    client = Slow(Target("http://127.0.0.1:9", "m"))
    sessions = [Session([Turn("x", 1)]) for _ in range(12)]
    await run(client, load_of(*sessions, concurrency=3))
    assert client.most == 3
    timed = Slow(Target("http://127.0.0.1:9", "m"))
    _, seconds = await run_workload(timed, load_of(*sessions, concurrency=100, rate=100.0), lambda _: None)
    await timed.close()
    assert seconds > 0.04  # twelve arrivals at a hundred a second, not all at once


@pytest.mark.slow
async def test_a_measured_server_and_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def options(url: str, **changes: Any) -> serving.Options:
        sizes = {"requests": 2, "input_len": 24, "output_len": 4, "turns": 2, "groups": 2}
        return serving.Options(url=url, model="tiny", output=str(tmp_path / "o.jsonl"), **{**sizes, **changes})

    with served() as server:
        url = server.url
        target = Target(url, "tiny")
        names = ["single", "shared-prefix", "conversations", "rate"]
        records = await serving._measure(
            options(url, rate=50.0, plot=str(tmp_path / "p.png")), names, target, ByteTokenizer()
        )
        twice = await serving._measure(options(url, repeat=2), ["single"], target, ByteTokenizer())
    assert [record["label"] for record in records] == names and all(record["failed"] == 0 for record in records)
    assert [record["requests"] for record in records] == [2, 4, 4, 2]
    assert [record["output_tokens"] for record in records] == [8, 16, 16, 8]
    assert [record["label"] for record in twice] == ["single 1", "single 2"]
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len(written) == 6 and {"date", "cores", "processor", "phloem"} <= written[0].keys()
    for name in names:
        assert (tmp_path / f"p-{name}.png").read_bytes()[:4] == b"\x89PNG"
    print_table(records, "title")
    assert "output tok/s" in capsys.readouterr().out


@pytest.mark.slow
def test_wrong_names_and_lines(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="unknown workload 'fast'"):
        serving.main(["--workload", "single,fast"])
    write_line(tmp_path / "new" / "f.jsonl", {"a": 1})
    write_line(tmp_path / "new" / "f.jsonl", {"a": 2})
    assert (tmp_path / "new" / "f.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
    failed = [Result(0.0, 1.0, 1.0, error="no")]
    plot(failed, summarise("x", failed, 1.0), tmp_path / "f.png")
    assert (tmp_path / "f.png").exists()
