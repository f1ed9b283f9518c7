"""Pods found through an API that is a fake: lists, watches, lost events, silence, refusals; what stays meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from gateway import Gateway, Request, Worker, gateway, head, say

from phloem.core.errors import ConfigError
from phloem.router import kubernetes
from phloem.router.kubernetes import Access
from phloem.router.settings import Settings


def pod(name: str, ip: str | None, ready: bool = True, **about: Any) -> dict[str, Any]:
    status = {"podIP": ip, "conditions": [{"type": "Ready", "status": str(ready)}]}
    return {"metadata": {"name": name, "uid": f"uid-{name}", "labels": {"app": "llm"}, **about}, "status": status}


@dataclass
class Api:
    """The part of Kubernetes' API that is asked. `pods` by selector; `refuse`: a status for every list."""

    pods: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refuse: int = 0
    gone: int = 0  # lists that answer 410 from now on
    page: int = 100
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    port: int = 0
    _watches: list[asyncio.StreamWriter] = field(default_factory=list)
    _server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def watches(self) -> int:
        return len(self._watches)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.sleep(0)

    def cut(self) -> None:
        """Every watch breaks."""
        watches, self._watches = self._watches, []
        for writer in watches:
            writer.transport.abort()

    async def tell(self, *events: dict[str, Any] | bytes) -> None:
        for event in events:
            data = event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n"
            for writer in list(self._watches):
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                await writer.drain()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                raw = await reader.readuntil(b"\r\n\r\n")
                first, *lines = raw.decode("latin-1").split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}
                method, target, _ = first.split(" ")
                await self._one(Request(method, target, headers, b"", writer))
        if writer in self._watches:
            self._watches.remove(writer)
        writer.close()

    async def _one(self, request: Request) -> None:
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.asked.append((parts.path, query))
        self.tokens.append(request.headers.get("authorization", ""))
        pods = self.pods.get(query["labelSelector"], [])
        if self.refuse:
            await say(request, self.refuse, {"kind": "Status", "message": "pods is forbidden"})
        elif "watch" in query:
            request.writer.write(head(200, {"content-type": "application/json", "transfer-encoding": "chunked"}))
            await request.writer.drain()
            self._watches.append(request.writer)
        elif self.gone and "continue" in query:
            self.gone -= 1
            await say(request, 410, {"kind": "Status", "message": "too old"})
        else:
            at = int(query.get("continue", 0))
            more = str(at + self.page) if at + self.page < len(pods) else ""
            about = {"resourceVersion": "7", "continue": more}
            await say(request, 200, {"kind": "PodList", "metadata": about, "items": pods[at : at + self.page]})


@contextlib.asynccontextmanager
async def found(tmp_path: Path, api: Api, workers: list[Worker], **more: Any) -> AsyncIterator[Gateway]:
    """A gateway that finds these workers, which are pods of one address each, at one port."""
    (tmp_path / "token").write_text("secret-1\n")
    (tmp_path / "namespace").write_text("serving")
    await api.start()
    settings = {"service_discovery": True, "selector": ("app=llm",), "kubernetes_api": api.url, **more}
    port = workers[0].port if workers else 1
    try:
        async with gateway(kubernetes_account=str(tmp_path), service_discovery_port=port, **settings) as gate:
            yield gate
    finally:
        await api.stop()
        for worker in workers:
            await worker.kill()


def urls(gate: Gateway) -> set[str]:
    return set(gate.router.fleet.workers)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(kubernetes, "MOST_WAIT", 0.1)


async def test_pods_that_are_ready_serve_and_those_that_end_do_not(tmp_path: Path) -> None:
    worker = Worker()
    await worker.start()
    here = f"http://127.0.0.1:{worker.port}"
    api = Api({"app=llm": [pod("a", "127.0.0.1"), pod("b", "127.0.0.2", ready=False), pod("c", None)]})
    async with found(tmp_path, api, [worker]) as gate:
        await gate.until(lambda: urls(gate) == {here} and gate.router.fleet.workers[here].healthy)
        assert await gate.by() == worker.port
        assert gate.router.fleet.workers[here].labels == {"pod": "a"}
        path, query = api.asked[0]
        assert path == "/api/v1/namespaces/serving/pods" and query["labelSelector"] == "app=llm"
        assert set(api.tokens) == {"Bearer secret-1"}
        await gate.until(lambda: api.watches == 1)
        assert api.asked[1][1]["resourceVersion"] == "7"
        other = f"http://127.0.0.2:{worker.port}"
        await api.tell({"type": "MODIFIED", "object": pod("b", "127.0.0.2")})
        await gate.until(lambda: urls(gate) == {here, other})
        await api.tell({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}})
        ends = pod("a", "127.0.0.1", deletionTimestamp="2026-01-01T00:00:00Z")
        await api.tell({"type": "MODIFIED", "object": ends})
        await gate.until(lambda: urls(gate) == {other})
        await api.tell({"type": "DELETED", "object": pod("b", "127.0.0.2")})
        await gate.until(lambda: not urls(gate))


async def test_what_was_lost_is_made_up_for_by_the_next_list(tmp_path: Path) -> None:
    api = Api({"app=llm": [pod("a", "127.0.0.1"), pod("b", "127.0.0.2")]})
    async with found(tmp_path, api, []) as gate:
        await gate.until(lambda: len(urls(gate)) == 2 and api.watches == 1)
        api.pods["app=llm"] = [pod("c", "127.0.0.3")]
        api.cut()  # a watch that breaks
        await gate.until(lambda: urls(gate) == {"http://127.0.0.3:1"} and api.watches == 1)
        api.pods["app=llm"] = [pod("d", "127.0.0.4")]
        await api.tell({"type": "ERROR", "object": {"code": 410}})  # one that is told to begin anew
        await gate.until(lambda: urls(gate) == {"http://127.0.0.4:1"} and api.watches == 1)
        api.pods["app=llm"] = [pod("e", "127.0.0.5")]
        api.cut()
        await gate.until(lambda: urls(gate) == {"http://127.0.0.5:1"} and api.watches == 1)
        api.pods["app=llm"] = []
        await api.tell(b"no json\n")
        await gate.until(lambda: not urls(gate))


async def test_a_watch_that_is_silent_ends_with_a_new_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "SILENCE", 0.1)
    api = Api({"app=llm": [pod("a", "127.0.0.1")]})
    async with found(tmp_path, api, []) as gate:
        await gate.until(lambda: len(urls(gate)) == 1 and api.watches >= 1)
        api.pods["app=llm"] = [pod("b", "127.0.0.2")]
        await gate.until(lambda: urls(gate) == {"http://127.0.0.2:1"})


async def test_long_lists_come_in_parts_that_may_grow_too_old(tmp_path: Path) -> None:
    api = Api({"app=llm": [pod(f"p{n}", f"127.0.1.{n + 1}") for n in range(7)]}, page=3, gone=1)
    async with found(tmp_path, api, []) as gate:
        await gate.until(lambda: len(urls(gate)) == 7)


async def test_servers_stay_while_the_api_cannot_be_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()
    await worker.start()
    api = Api({"app=llm": [pod("a", "127.0.0.1")]})
    async with found(tmp_path, api, [worker]) as gate:
        here = f"http://127.0.0.1:{worker.port}"
        await gate.until(lambda: urls(gate) == {here} and gate.router.fleet.workers[here].healthy and api.watches == 1)
        api.refuse = 403
        api.cut()
        asked = len(api.asked)
        await gate.until(lambda: len(api.asked) > asked + 2)
        assert await gate.by() == worker.port
        assert "get, list and watch of pods" in caplog.text
        api.refuse = 0
        (tmp_path / "token").write_text("secret-2")  # as Kubernetes renews it
        await gate.until(lambda: api.watches == 1)
        assert api.tokens[-1] == "Bearer secret-2"
        await api.stop()
        await asyncio.sleep(0.1)
        assert await gate.by() == worker.port
        await api.start()
        await gate.until(lambda: api.watches == 1)


async def test_servers_that_were_added_by_hand_are_left_alone(tmp_path: Path) -> None:
    api = Api({"app=llm": [pod("a", "127.0.0.1")]})
    async with found(tmp_path, api, [], selector=("app=llm", "tier=a")) as gate:
        await gate.until(lambda: bool(api.watches))
        assert not urls(gate)  # both labels are asked for
        gate.router.fleet.add("http://127.0.0.1:1")
        gate.router.fleet.add("http://127.0.0.9:1")
        await api.tell({"type": "ADDED", "object": pod("a", "127.0.0.1")})
        await api.tell({"type": "ADDED", "object": pod("b", "127.0.0.2")})
        await gate.until(lambda: len(urls(gate)) == 3)
        await api.tell({"type": "DELETED", "object": pod("a", "127.0.0.1")})
        await api.tell({"type": "DELETED", "object": pod("b", "127.0.0.2")})
        await gate.until(lambda: urls(gate) == {"http://127.0.0.1:1", "http://127.0.0.9:1"})


async def test_pairs_are_told_apart_by_their_labels(tmp_path: Path) -> None:
    ports = {"annotations": {"sglang.ai/bootstrap-port": "9001"}}
    api = Api({"part=prefill": [pod("p", "127.0.0.1", **ports)], "part=decode": [pod("d", "::1")]})
    labels = {"selector": (), "prefill_selector": ("part=prefill",), "decode_selector": ("part=decode",)}
    async with found(tmp_path, api, [], **labels) as gate:
        await gate.until(lambda: len(urls(gate)) == 2)
        workers = gate.router.fleet.workers
        found_there = {url: (worker.role, worker.bootstrap_port) for url, worker in workers.items()}
        assert found_there == {"http://127.0.0.1:1": ("prefill", 9001), "http://[::1]:1": ("decode", 8998)}


def test_where_the_api_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(service_discovery=True, selector=("a=b",), kubernetes_account=str(tmp_path)).checked()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no pod of Kubernetes"):
        Access.of(settings)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    with pytest.raises(ConfigError, match="service_discovery_namespace"):
        Access.of(settings)
    (tmp_path / "namespace").write_text("mine\n")
    access = Access.of(settings)
    assert access.url == "https://[fd00::1]:6443" and access.namespace == "mine"
    (tmp_path / "ca.crt").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"ca\.crt"):
        access.client()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"selector": ("a=b",)}, "needs service_discovery"),
        ({"service_discovery": True}, "selector says which pods"),
        ({"service_discovery": True, "selector": ("a",)}, "no label"),
        ({"service_discovery": True, "selector": ("a=b&watch=1",)}, "no label"),
        ({"service_discovery": True, "selector": ("a=b",), "decode_selector": ("a=c",)}, "prefill_selector"),
        ({"service_discovery": True, "selector": ("a=b",), "service_discovery_port": 0}, "1 to 65535"),
    ],
)
def test_settings_that_find_nothing_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**values).checked()
