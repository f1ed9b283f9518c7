"""What breaks gateways: odd numbers and names, workers that restart or never end, bodies that pile up."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from gateway import Request, Worker, gateway, say, stream

from phloem.cli.router import parse
from phloem.core.errors import BadRequest, ConfigError
from phloem.router import ask
from phloem.router.address import parse_url
from phloem.router.settings import Settings

EVENTS = [b"data: %d\n\n" % at for at in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"messages": [], "max_tokens": 1' + b"0" * 400 + b"}", {}),
        (b'{"text": "a", "sampling_params": {"max_new_tokens": 1' + b"0" * 400 + b"}}", {}),
        (b"{}", {"x-priority": "--5"}),
        (b"{}", {"x-priority": "-" * 12 + "9"}),
        (b"{}", {"x-priority": "9" * 40}),
    ],
)
async def test_numbers_without_measure_are_for_the_worker_to_refuse(body: bytes, headers: dict[str, str]) -> None:
    async with gateway(Worker()) as gate:
        answer = await gate.http.post("/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        answer = await gate.http.post("/generate", content=body, headers=headers)
        assert answer.status_code == 200 and gate.workers[0].seen[-1].body == body
        gate.idle()


@pytest.mark.parametrize(
    "url", ["http://a..b:80", f"http://{'a' * 70}:80", "http://a b:1", "http://h\0:1", "http://h:0"]
)
def test_what_is_no_address_is_refused_when_it_is_added(url: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_url(url)
    assert refused.value.param == "url"


def test_names_of_hosts_are_spelled_as_they_are_looked_up() -> None:
    name = "xn--bcher-kva.example"
    assert parse_url("http://b\u00fccher.example:81") == (f"http://{name}:81", name, 81)
    assert parse_url("http://phloem_server-0.pods:30000")[1] == "phloem_server-0.pods"
    assert parse_url("[0:0::1]:5") == ("http://[::1]:5", "::1", 5)


async def test_a_removed_worker_whose_stream_outlasts_the_drain_leaves_nobody_hanging() -> None:
    async def endless(request: Request) -> None:
        await stream(request, EVENTS * 50, 0.02)

    async with gateway(Worker(answer=endless), drain_timeout=0.2) as gate:
        async with gate.http.stream("POST", "/v1/chat/completions", json={"stream": True}) as response:
            parts = response.aiter_text()
            assert await anext(parts)
            assert (await gate.http.delete(f"/workers/{gate.workers[0].url}")).status_code == 202
            rest = await asyncio.wait_for(_whole(parts), 10)
        assert '"retryable":true' in rest and "has been removed" in rest and rest.endswith("data: [DONE]\n\n")
        assert not gate.router.relay.flying


async def _whole(parts: Any) -> str:
    return "".join([part async for part in parts])


async def test_a_named_worker_is_tried_again_and_no_other_is_asked_for_it() -> None:
    answers = [503, 200]

    async def busy(request: Request) -> None:
        await say(request, answers.pop(0), {})

    async with gateway(Worker(answer=busy), Worker(), policy="manual") as gate:
        named, other = gate.workers
        answer = await gate.chat(headers={"x-worker": named.url})
        assert (answer.status_code, len(named.seen), len(other.seen)) == (200, 2, 0)
        named.ill = True
        await gate.until(lambda: not gate.router.fleet.workers[named.url].healthy)
        answer = await gate.chat(headers={"x-worker": named.url})
        assert answer.status_code == 503 and answer.json()["error"]["retryable"] and not other.seen
        assert (await gate.chat(headers={"x-worker": "ghost"})).json()["error"]["param"] == "x-worker"
        gate.idle()


@pytest.mark.parametrize(
    ("begin", "again"),
    [
        (b"HTTP/1.1 200 OK\r\nx: ", b"a"),  # a line without an end
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ", b"a"),  # a trailer, likewise
    ],
)
async def test_a_header_without_an_end_is_cut_off(begin: bytes, again: bytes) -> None:
    sent = 0

    async def endless(request: Request) -> None:
        nonlocal sent
        request.writer.write(begin)
        for _ in range(2000):
            request.writer.write(again * (16384 // len(again)))
            sent += 16384
            await request.writer.drain()
            await asyncio.sleep(0)

    async with gateway(Worker(answer=endless), retry_max_retries=0) as gate:
        answer = None
        try:
            answer = await asyncio.wait_for(gate.chat(), 10)
        except httpx.RemoteProtocolError:
            assert b"chunked" in begin  # the head had gone out by then
        assert answer is None or answer.status_code == 503
        await gate.until(lambda: not gate.router.relay.flying)
        assert sent < 8 << 20  # far below what it would send: sockets hold some of it


@pytest.mark.parametrize("loads", [[1], "x", {"total_prefill_uncached_tokens": None, "total_prefill_busy_us": "x"}])
async def test_a_worker_that_tells_its_load_otherwise_serves_all_the_same(loads: Any) -> None:
    async with gateway(Worker(loads=loads)) as gate:
        assert (await gate.chat()).status_code == 200


@pytest.mark.slow
async def test_others_are_served_while_the_request_that_tried_a_circuit_still_streams() -> None:
    good = False

    async def answer(request: Request) -> None:
        if good:
            await stream(request, EVENTS, 0.05)
        else:
            await say(request, 500, {})

    limits = {"cb_failure_threshold": 2, "cb_timeout_duration_secs": 0.2, "disable_retries": True}
    async with gateway(Worker(answer=answer), **limits) as gate:
        assert [(await gate.chat()).status_code for _ in range(2)] == [500, 500]
        assert (await gate.chat()).status_code == 503
        good = True
        await asyncio.sleep(0.25)
        async with gate.http.stream("POST", "/generate", json={}) as trial:
            parts = trial.aiter_text()
            assert await anext(parts)
            assert (await gate.chat(stream=True)).status_code == 200
            assert (await _whole(parts)).endswith("data: 19\n\n")
        gate.idle()


@pytest.mark.slow
async def test_bodies_count_until_the_answer_begins_and_are_not_held_beyond() -> None:
    go = asyncio.Event()

    async def late(request: Request) -> None:
        await go.wait()
        await stream(request, EVENTS, 0.02)

    size = 4 << 20
    async with gateway(Worker(answer=late), max_bodies_bytes=3 * size, max_payload_size=size) as gate:
        body = json.dumps({"text": "x" * (size - 1000)})

        async def ask() -> httpx.Response:
            return await gate.http.post("/generate", content=body)

        first = [asyncio.create_task(ask()) for _ in range(3)]
        budget = gate.router._bounded.budget
        await gate.until(lambda: len(gate.workers[0].seen) == 3)
        assert budget.held > 2 * size
        refused = await ask()
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "bodies_full"
        go.set()
        await gate.until(lambda: not budget.held)
        assert any(not task.done() for task in first)  # their streams go on
        assert [answer.status_code for answer in await asyncio.gather(*first)] == [200] * 3
        gate.idle()


async def test_what_was_sent_to_a_worker_counts_no_more_once_its_port_was_closed() -> None:
    async with gateway(Worker(), Worker(), policy="cache_aware") as gate:
        first = await gate.by("z" * 4000)
        assert await gate.by("z" * 4000) == first
        seen = gate.router.fleet.policy("tiny")._seen  # type: ignore[attr-defined]
        assert len(seen)
        (worker,) = (worker for worker in gate.workers if worker.port == first)
        await worker.kill()
        await gate.until(lambda: not len(seen))  # a look has found nobody there
        await worker.start()
        await gate.until(lambda: gate.router.fleet.workers[worker.url].fails == 0)
        assert (await gate.chat("z" * 4000)).status_code == 200


async def test_a_form_goes_to_the_servers_of_the_model_that_it_names() -> None:
    async with gateway(Worker(models=["hears"]), Worker(models=["writes"]), Worker(models=["writes"])) as gate:
        sound = b"RIFF" + bytes(range(256)) * 500
        first, *others = (worker.port for worker in gate.workers)
        for name, ports in (("hears", [first]), ("writes", others)):
            for _ in range(4):
                files = {"file": ("a.wav", sound, "audio/wav")}
                answer = await gate.http.post("/v1/audio/transcriptions", data={"model": name}, files=files)
                assert answer.json()["by"] in ports
        answer = await gate.http.post("/v1/audio/transcriptions", data={"model": "ghost"}, files={"file": b"x"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_a_form_is_read_wherever_its_model_stands_and_in_little_time() -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    file = part % (b"file", b'; filename="a"\r\nContent-Type: audio/wav', b"\r\n\0" * (4 << 20))
    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    begun = time.perf_counter()
    for body in (part % (b"model", b"", b"m-1") + file, file + part % (b"model", b"", b"m-1")):
        assert ask.read("/v1/audio/transcriptions", headers, body + b"--x--\r\n", ()).model == "m-1"
    assert ask.read("/v1/audio/transcriptions", headers, file, ()).model == ""
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"api_key": ("",)}, "api_key"),
        ({"api_key": ("good", "b\u00e4d")}, "api_key"),
        ({"worker_api_key": "a\r\nx: 1"}, "worker_api_key"),
        ({"worker_api_key": ""}, "worker_api_key"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests"),
        ({"stall_timeout": float("nan")}, "stall_timeout"),
        ({"worker_urls": ("http://a..b",)}, "worker_urls"),
    ],
)
def test_settings_that_would_let_everybody_or_nobody_in_are_refused(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings(**values).checked()
    assert refused.value.param == name


def test_keys_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHLOEM_API_KEY", "from-outside")
    monkeypatch.setenv("PHLOEM_WORKER_API_KEY", "theirs")
    assert (parse([]).api_key, parse([]).worker_api_key) == (("from-outside",), "theirs")
    assert parse(["--api-key", "a", "b"]).api_key == ("a", "b")


async def test_workers_that_share_the_gateways_key_serve_and_others_say_what_they_lack() -> None:
    async with gateway(Worker(key="shared"), api_key=("shared", "second")) as gate:
        assert (await gate.chat(headers={"authorization": "Bearer shared"})).status_code == 200
        asked = await gate.http.post("/flush_cache", headers={"authorization": "Bearer shared"})
        assert asked.json()["success"] is True
    hidden = Worker(key="other")
    async with gateway(Worker(), api_key=("shared",)) as gate:
        await hidden.start()
        key = {"authorization": "Bearer shared"}
        await gate.http.post("/workers", json={"url": hidden.url}, headers=key)
        worker = gate.router.fleet.workers[hidden.url]
        await gate.until(lambda: "--worker-api-key" in worker.why)
        assert not worker.healthy and (await gate.chat(headers=key)).status_code == 200
        await hidden.kill()


@pytest.mark.slow
async def test_a_client_that_takes_nothing_does_not_keep_its_place_for_ever() -> None:
    async def long(request: Request) -> None:
        await stream(request, [b"data: " + b"x" * 100_000 + b"\n\n"] * 300)

    async with gateway(Worker(answer=long), stall_timeout=0.4, max_concurrent_requests=1) as gate:
        _, writer = await asyncio.open_connection("127.0.0.1", int(gate.url.rsplit(":", 1)[1]), limit=1024)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        await gate.until(lambda: gate.router.gate.inside == 1)
        await gate.until(lambda: not gate.router.gate.inside, 20)
        assert (await gate.http.get("/v1/other")).status_code == 200
        gate.idle()
        assert gate.router.metrics.broken_streams == 0 and gate.router.metrics.left == 1
        writer.close()
