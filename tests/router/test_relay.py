"""Requests on their way through the gateway: bytes as they come, retries, ends, hostile input."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import pytest
from gateway import Request, Worker, gateway, head, say, stream

EVENTS = [b"data: %d\n\n" % at for at in range(20)]


async def events_of(response: httpx.Response) -> list[str]:
    return [block.removeprefix("data: ") for block in (await response.aread()).decode().split("\n\n") if block]


async def test_bytes_headers_and_status_pass_as_they_are() -> None:
    async def answer(request: Request) -> None:
        await say(request, 418, b"\x00\xff raw", **{"x-own": "yes", "content-type": "application/x-own"})

    async with gateway(Worker(answer=answer)) as gate:
        sent = {"x-request-id": "mine-1", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
        response = await gate.http.post("/v1/odd%2Fpath?x=1&y=%20", content=b"not json \xff", headers=sent)
        assert (response.status_code, response.content) == (418, b"\x00\xff raw")
        assert response.headers["x-own"] == "yes" and response.headers["content-type"] == "application/x-own"
        assert response.headers["x-request-id"] == "mine-1"
        (seen,) = gate.workers[0].seen
        assert (seen.method, seen.path, seen.body) == ("POST", "/v1/odd%2Fpath?x=1&y=%20", b"not json \xff")
        assert seen.headers["x-request-id"] == "mine-1" and seen.headers["traceparent"] == sent["traceparent"]
        assert seen.headers["host"] == f"127.0.0.1:{gate.workers[0].port}"
        gate.idle()


async def test_a_request_without_an_id_gets_one_and_a_bad_one_is_replaced() -> None:
    async with gateway(Worker()) as gate:
        first = (await gate.chat()).headers["x-request-id"]
        second = (await gate.chat(headers={"x-request-id": "a b\tc"})).headers["x-request-id"]
        assert first and second and first != second and second != "a b\tc"
        assert [request.headers["x-request-id"] for request in gate.workers[0].seen] == [first, second]


async def test_events_come_one_by_one_and_not_at_the_end() -> None:
    go = asyncio.Event()

    async def answer(request: Request) -> None:
        request.writer.write(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))
        request.writer.write(b"9\r\ndata: 0\n\n\r\n")
        await go.wait()
        request.writer.write(b"9\r\ndata: 1\n\n\r\n0\r\n\r\n")

    async with gateway(Worker(answer=answer)) as gate, gate.http.stream("POST", "/generate", json={}) as response:
        parts = response.aiter_raw()
        assert await anext(parts) == b"data: 0\n\n"
        go.set()
        assert b"".join([part async for part in parts]) == b"data: 1\n\n"


async def test_a_long_stream_arrives_whole_also_at_a_slow_client() -> None:
    event = b"data: " + b"x" * 20_000 + b"\n\n"
    count = 300

    async def answer(request: Request) -> None:
        await stream(request, [event] * count)

    async with gateway(Worker(answer=answer)) as gate:
        got = 0
        async with gate.http.stream("POST", "/generate", json={}) as response:
            async for part in response.aiter_raw(65536):
                got += len(part)
                if got < 500_000:
                    await asyncio.sleep(0.02)
        assert got == len(event) * count
        gate.idle()


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
async def test_a_worker_that_answers_with_a_fault_is_not_the_last_word(status: int) -> None:
    async def bad(request: Request) -> None:
        await say(request, status, {"error": {"message": "no"}})

    async with gateway(Worker(answer=bad), Worker()) as gate:
        good = gate.workers[1].port
        assert [await gate.by() for _ in range(6)] == [good] * 6
        assert gate.router.metrics.retries >= 1
        gate.idle()


async def test_a_fault_of_all_workers_is_passed_on_at_the_last_try() -> None:
    async def bad(request: Request) -> None:
        await say(request, 500, {"error": {"message": f"fault of {gate.workers[0].port}"}})

    async with gateway(Worker(answer=bad), retry_max_retries=2) as gate:
        response = await gate.chat()
        assert response.status_code == 500 and "fault of" in response.text
        assert len(gate.workers[0].seen) == 3
        gate.idle()


async def test_a_refusal_by_a_worker_is_passed_on_at_once() -> None:
    async def refuses(request: Request) -> None:
        await say(request, 400, {"error": {"message": "no such field"}})

    async with gateway(Worker(answer=refuses), Worker(answer=refuses)) as gate:
        assert (await gate.chat()).status_code == 400
        assert len(gate.workers[0].seen) + len(gate.workers[1].seen) == 1


@pytest.mark.slow
async def test_a_worker_that_dies_before_its_first_byte_costs_a_retry_and_after_it_an_error_event() -> None:
    async def before(request: Request) -> None:
        request.writer.transport.abort()
        raise ConnectionError

    async def after(request: Request) -> None:
        await stream(request, EVENTS[:5], end=False)
        await asyncio.sleep(0.05)
        request.writer.transport.abort()
        raise ConnectionError

    async with gateway(Worker(answer=before), Worker()) as gate:
        assert [await gate.by() for _ in range(4)] == [gate.workers[1].port] * 4
        gate.idle()
    async with gateway(Worker(answer=after), Worker(answer=after)) as gate:
        async with gate.http.stream("POST", "/v1/chat/completions", json={"stream": True}) as response:
            blocks = await events_of(response)
        assert blocks[:5] == ["0", "1", "2", "3", "4"] and blocks[-1] == "[DONE]"
        error = json.loads(blocks[-2])["error"]
        assert error["retryable"] is True and error["code"] == "worker_lost" and "broke off" in error["message"]
        assert len(gate.workers[0].seen) + len(gate.workers[1].seen) == 1  # never sent again
        async with gate.http.stream("POST", "/v1/messages", json={"stream": True}) as response:
            text = (await response.aread()).decode()
        assert text.endswith("\n\n") and "event: error\ndata: " in text and '"overloaded_error"' in text
        gate.idle()


async def test_a_promised_length_that_is_not_kept_ends_the_connection() -> None:
    async def short(request: Request) -> None:
        request.writer.write(head(200, {"content-length": "100"}) + b"x" * 10)
        await request.writer.drain()
        await asyncio.sleep(0.05)
        request.writer.transport.abort()
        raise ConnectionError

    async with gateway(Worker(answer=short)) as gate:
        with pytest.raises(httpx.RemoteProtocolError):
            await gate.chat()
        await asyncio.sleep(0.01)
        gate.idle()


async def test_kept_connections_that_the_worker_has_closed_are_no_fault() -> None:
    async with gateway(Worker(), disable_retries=True, health_check_interval_secs=60.0) as gate:
        await gate.by()
        for writer in list(gate.workers[0]._writers):
            writer.close()
        await asyncio.sleep(0.05)
        await gate.by()
        assert not gate.router.metrics.failed


async def test_a_client_that_leaves_ends_the_request_at_the_worker() -> None:
    async def slow(request: Request) -> None:
        await stream(request, EVENTS * 100, pause=0.02)

    async with gateway(Worker(answer=slow)) as gate:
        async with gate.http.stream("POST", "/generate", json={"stream": True}) as response:
            assert await anext(response.aiter_raw())
        await gate.until(lambda: gate.workers[0].hung_up == 1)
        assert gate.router.metrics.left == 1 and not gate.router.metrics.failed
        gate.idle()


async def test_a_client_that_leaves_before_the_first_byte_ends_it_too() -> None:
    came, never = asyncio.Event(), asyncio.Event()

    async def silent(request: Request) -> None:
        came.set()
        await never.wait()

    async with gateway(Worker(answer=silent), Worker(answer=silent)) as gate:
        task = asyncio.create_task(gate.chat())
        await came.wait()
        task.cancel()
        await gate.until(lambda: not gate.router.relay.flying)
        assert len(gate.workers[0].seen) + len(gate.workers[1].seen) == 1
        await gate.until(lambda: not gate.router.gate.inside)
        gate.idle()


@pytest.mark.slow
async def test_what_waits_for_too_long_ends_with_its_reason() -> None:
    async def silent(request: Request) -> None:
        await asyncio.sleep(5)

    async def stalls(request: Request) -> None:
        await stream(request, EVENTS[:2], end=False)
        await asyncio.sleep(5)

    async with gateway(Worker(answer=silent), first_byte_timeout=0.2, retry_max_retries=1) as gate:
        response = await gate.chat()
        error = response.json()["error"]
        assert response.status_code == 503 and error["retryable"] and "no first byte within 0.2 s" in error["message"]
        gate.idle()
    async with gateway(Worker(answer=stalls), stall_timeout=0.2) as gate:
        async with gate.http.stream("POST", "/generate", json={"stream": True}) as response:
            blocks = await events_of(response)
        assert blocks[:2] == ["0", "1"] and "nothing came for 0.2 s" in blocks[2]
        gate.idle()


async def test_answers_that_are_no_http_or_have_endless_headers_are_faults_of_their_worker() -> None:
    async def noise(request: Request) -> None:
        request.writer.write(b"\x00\x01\x02 what?\r\n\r\n")
        await request.writer.drain()
        await asyncio.sleep(1)

    async def endless(request: Request) -> None:
        request.writer.write(b"HTTP/1.1 200 OK\r\n" + b"x-more: " + b"y" * 200_000 + b"\r\n\r\n")
        await request.writer.drain()
        await asyncio.sleep(1)

    for answer in (noise, endless):
        async with gateway(Worker(answer=answer), Worker()) as gate:
            assert [await gate.by() for _ in range(3)] == [gate.workers[1].port] * 3
            gate.idle()


async def test_hostile_requests_are_refused_and_the_gateway_goes_on() -> None:
    async with gateway(Worker(), max_payload_size=10_000) as gate:
        response = await gate.http.post("/generate", content=b"x" * 10_001)
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        response = await gate.http.post("/generate", json={}, headers={"x-big": "y" * 70_000})
        assert response.status_code == 431
        deep = b'{"messages":' + b"[" * 4000 + b"]" * 4000 + b"}"
        assert (await gate.http.post("/v1/chat/completions", content=deep)).status_code == 200  # for a worker to refuse
        for raw in (
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\x00",
            b"POST /generate HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        ):
            with socket.create_connection(gate.url.removeprefix("http://").split(":"), timeout=2) as sock:  # type: ignore[arg-type]
                await asyncio.to_thread(sock.sendall, raw)
                answer = await asyncio.to_thread(sock.recv, 100)
                assert answer == b"" or b" 400 " in answer
        smuggled = b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n"
        smuggled += b"0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n"
        with socket.create_connection(gate.url.removeprefix("http://").split(":"), timeout=2) as sock:  # type: ignore[arg-type]
            await asyncio.to_thread(sock.sendall, smuggled)
            assert b" 400 " in await asyncio.to_thread(sock.recv, 100)
        assert not any("evil" in request.path for request in gate.workers[0].seen)
        await gate.by()
        gate.idle()


@pytest.mark.slow
async def test_many_requests_at_once_each_get_their_own_answer() -> None:
    async def echo(request: Request) -> None:
        await asyncio.sleep(0.001)
        await stream(request, [b"data: " + request.body + b"\n\n", *EVENTS[:3]])

    async with gateway(Worker(answer=echo), Worker(answer=echo)) as gate:

        async def one(at: int) -> str:
            return (await gate.http.post("/generate", json={"at": at})).text

        texts = await asyncio.gather(*(one(at) for at in range(100)))
        assert all(f'"at":{at}}}'.replace(" ", "") in text.replace(" ", "") for at, text in enumerate(texts))
        assert abs(len(gate.workers[0].seen) - len(gate.workers[1].seen)) <= 1
        gate.idle()


async def test_a_head_request_has_no_body_and_a_get_passes() -> None:
    async with gateway(Worker()) as gate:
        assert (await gate.http.head("/model_info")).content == b""
        assert (await gate.http.get("/model_info")).json() == {"by": gate.workers[0].port}


@pytest.mark.slow
async def test_a_killed_worker_under_load_leaves_nobody_hanging() -> None:
    """Requests without a byte are sent elsewhere; streams that had begun end with an error; all are accounted for."""

    async def speaks(request: Request) -> None:
        await asyncio.sleep(0.02)
        await stream(request, EVENTS, pause=0.005)

    first, second = Worker(answer=speaks), Worker(answer=speaks)
    async with gateway(first, second) as gate:
        ends: list[str] = []

        async def one(at: int) -> None:
            await asyncio.sleep(at * 0.004)
            async with gate.http.stream("POST", "/generate", json={"stream": True}) as response:
                assert response.status_code == 200
                ends.append((await events_of(response))[-1])

        async def kill() -> None:
            await asyncio.sleep(0.15)
            await first.kill()

        await asyncio.wait_for(asyncio.gather(kill(), *(one(at) for at in range(80))), 60)
        whole, broken = ends.count("19"), ends.count("[DONE]")
        assert whole + broken == 80 and broken >= 1 and whole >= 40
        assert gate.router.metrics.broken_streams == broken
        await gate.until(lambda: not gate.router.fleet.workers[first.url].healthy)
        gate.idle()
        await first.start()
        await gate.until(lambda: gate.router.fleet.workers[first.url].healthy)
        before = len(first.seen)
        await asyncio.gather(*(gate.chat() for _ in range(4)))
        assert len(first.seen) > before
