"""A gateway in this process on a real socket, and workers that do what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from phloem.router.app import Router
from phloem.router.serve import serve
from phloem.router.settings import Settings
from phloem.utils.sockets import bind

Headers = dict[str, str]


@dataclass
class Request:
    method: str
    path: str
    headers: Headers
    body: bytes
    writer: asyncio.StreamWriter

    def json(self) -> Any:
        return json.loads(self.body)


Answer = Callable[[Request], Awaitable[None]]


def head(status: int, headers: Headers) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def say(request: Request, status: int, body: Any, **headers: str) -> None:
    """A whole answer, with its length."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request.writer.write(
        head(status, {"content-type": "application/json", "content-length": str(len(data)), **headers})
    )
    request.writer.write(data)
    await request.writer.drain()


async def stream(request: Request, events: list[bytes], pause: float = 0.0, end: bool = True) -> None:
    """An answer in chunks; without `end` it stops short of its last one."""
    request.writer.write(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))
    for event in events:
        request.writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await request.writer.drain()
        await asyncio.sleep(pause)
    if end:
        request.writer.write(b"0\r\n\r\n")
        await request.writer.drain()


@dataclass
class Worker:
    """A server of one model in this process. `answer` does what the model would."""

    models: list[str] = field(default_factory=lambda: ["tiny"])
    answer: Answer | None = None
    ill: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    loads: dict[str, Any] = field(default_factory=dict)
    dump: dict[str, Any] | None = None
    key: str = ""  # asked for on every route but /health
    seen: list[Request] = field(default_factory=list)
    hung_up: int = 0  # clients that left before their answer's end
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", port or self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """As a process that ends: the port is closed, and every connection cut."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                raw = await reader.readuntil(b"\r\n\r\n")
                first, *lines = raw.decode("latin-1").split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                await self._one(Request(method, path, headers, body, writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _one(self, request: Request) -> None:
        if request.path == "/health":
            await say(request, 503 if self.ill else 200, {})
        elif self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            await say(request, 401, {})
        elif request.path == "/server_info":
            await say(request, 200, self.facts)
        elif request.path == "/v1/models":
            await say(request, 200, {"data": [{"id": name} for name in self.models]})
        elif request.path == "/v1/loads":
            await say(request, 200, {"loads": [self.loads]})
        elif request.path == "/kv_events/dump" and self.dump is not None:
            await say(request, 200, self.dump)
        elif request.path == "/kv_events/dump":
            await say(request, 404, {})
        else:
            self.seen.append(request)
            try:
                await (self.answer or self.usual)(request)
            except ConnectionError:
                self.hung_up += 1
                raise

    async def usual(self, request: Request) -> None:
        await say(request, 200, {"by": self.port})


@dataclass
class Gateway:
    router: Router
    url: str
    http: httpx.AsyncClient
    workers: list[Worker]

    async def chat(self, text: str = "hello", path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
        headers = more.pop("headers", {})
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}
        return await self.http.post(path, json=body, headers=headers)

    async def by(self, text: str = "hello", **more: Any) -> int:
        """The port of the worker that answered."""
        response = await self.chat(text, **more)
        assert response.status_code == 200, response.text
        return response.json()["by"]

    async def until(self, true: Callable[[], bool], seconds: float = 30.0) -> None:
        async with asyncio.timeout(seconds):
            while not true():
                await asyncio.sleep(0.01)

    def idle(self) -> None:
        """Nothing is counted as in flight anywhere."""
        for worker in self.router.fleet.workers.values():
            assert (worker.running, worker.pending, worker.decoding) == (0, 0, 0), worker.url
        assert not self.router.relay.flying and not self.router.gate.inside and not self.router.gate.waiting


@contextlib.asynccontextmanager
async def gateway(*workers: Worker, seed: int = 1, **settings: Any) -> AsyncIterator[Gateway]:
    """With these workers, all well."""
    for worker in workers:
        await worker.start()
    quick = {"health_check_interval_secs": 0.05, "drain_timeout": 1.0, "retry_initial_backoff_ms": 5.0}
    urls = tuple(worker.url for worker in workers)
    made = Settings(**{"port": 0, "worker_urls": urls, "policy": "round_robin", **quick, **settings}).checked()
    router, stop, ready = Router(made, seed=seed), asyncio.Event(), asyncio.Event()
    sock = bind(made.host, 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    task = asyncio.create_task(serve(router, made, sock, lambda _: ready.set(), stop))
    await asyncio.wait_for(ready.wait(), 30)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        found = Gateway(router, url, http, list(workers))
        await found.until(lambda: all(worker.healthy for worker in router.fleet.workers.values()))
        try:
            yield found
        finally:
            stop.set()
            await asyncio.wait_for(task, 30)
            for worker in workers:
                await worker.kill()
