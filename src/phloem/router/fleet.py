"""The servers: added and removed while the gateway runs, looked after, and grouped by the models that they serve."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import random
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.core.errors import BadRequest, EngineDead, NotFound
from phloem.router.address import parse_url
from phloem.router.cached import Cached
from phloem.router.follow import Follower
from phloem.router.pairs import DECODE, PREFILL, REGULAR
from phloem.router.policies import POLICIES
from phloem.router.settings import BOOTSTRAP_PORT, prefill_of
from phloem.router.upstream import Exchange, UpstreamError
from phloem.router.worker import Worker
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.router.policies._base import Policy
    from phloem.router.settings import Settings

_log = log.get("router")

AT_ONCE = 64  # looks at servers that run beside one another
FACTS_EVERY = 6  # looks between two questions for models and cache events
SOON_SECONDS = 0.5  # between looks at a server that has just broken or come back
LEAST_SECONDS = 0.1  # between two looks, whatever happens
MOST_ANSWER = 256 << 20
ANY_MODEL = "*"


class Fleet:
    """`start` begins to look after the servers; `close` ends it."""

    def __init__(self, settings: Settings, seed: int | None = None) -> None:
        self.settings = settings
        self.cached = Cached()
        self.workers: dict[str, Worker] = {}  # by address
        self._draw = random.Random(seed)
        self._policies: dict[str, Policy] = {}
        self._followers: dict[Worker, tuple[Any, asyncio.Task[None] | None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._busy = asyncio.Semaphore(AT_ONCE)
        self._bits = 0
        self._told_zmq = False
        # To ask servers about themselves; clients' requests bring their own key where there is no other.
        self._key = settings.worker_api_key or next(iter(settings.api_key), None)
        POLICIES.check(settings.policy)

    # who there is

    def add(
        self,
        url: str,
        models: Iterable[str] = (),
        priority: int = 0,
        labels: dict[str, Any] | None = None,
        role: str = REGULAR,
        bootstrap_port: int = BOOTSTRAP_PORT,
    ) -> Worker:
        """Raises BadRequest: the address is none, or known."""
        text = parse_url(url)[0]
        if text in self.workers:
            raise BadRequest(f"worker {text} is there already", param="url", code="worker_exists")
        free = next(bit for bit in range(self._bits.bit_length() + 1) if not self._bits >> bit & 1)
        self._bits |= 1 << free
        worker = Worker.at(text, self.settings, free)
        worker.given_models = worker.models = tuple(models)
        worker.priority, worker.labels = priority, labels or {}
        worker.role, worker.bootstrap_port = role, bootstrap_port
        self.workers[text] = worker
        _log.info("worker %s added", text)
        self._spawn(self._look_after(worker))
        return worker

    def find(self, name: str) -> Worker:
        """By id or address. Raises NotFound."""
        for worker in self.workers.values():
            if name == worker.id:
                return worker
        with contextlib.suppress(BadRequest):
            found = self.workers.get(parse_url(name)[0])
            if found is not None:
                return found
        raise NotFound(f"there is no worker {name!r:.200}", code="worker_not_found")

    def remove(self, name: str) -> Worker:
        """Nothing new is sent there; what is in flight ends, within `drain_timeout`. Raises NotFound."""
        worker = self.find(name)
        worker.draining = True
        del self.workers[worker.url]
        _log.info("worker %s removed, %d requests are in flight there", worker.url, worker.running)
        self._forget(worker)
        self._spawn(self._drain(worker))
        return worker

    async def _drain(self, worker: Worker) -> None:
        deadline = asyncio.get_running_loop().time() + self.settings.drain_timeout
        while worker.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        worker.pool.close()
        self._bits &= ~(1 << worker.bit)

    def _forget(self, worker: Worker) -> None:
        """It has, or will have, nothing cached."""
        for policy in self._policies.values():
            policy.gone(worker)
        self._unfollow(worker)

    # who may be asked

    def models(self) -> dict[str, list[Worker]]:
        found: dict[str, list[Worker]] = {}
        for worker in self.workers.values():
            for name in worker.models:
                found.setdefault(name, []).append(worker)
        return found

    def candidates(self, model: str) -> list[Worker]:
        """The servers of a model, well or not.

        Raises:
            NotFound: several models are served, and this is none of them.
            EngineDead: there are no servers at all, or none has said yet what it serves.
        """
        everyone = list(self.workers.values())
        if not everyone:
            raise EngineDead("no worker has been added", code="no_worker")
        found = [worker for worker in everyone if model in worker.models or ANY_MODEL in worker.models]
        if found:
            return found
        known = [worker for worker in everyone if worker.models]
        if not known:
            raise EngineDead("no worker has said yet which model it serves", code="no_worker")
        base = model.partition(":")[0]
        if found := [worker for worker in known if base in worker.models]:
            return found
        # With one model that is everywhere, a server knows better than we do what it answers to.
        first = known[0].models[0]
        if not model or all(first in worker.models for worker in known):
            return known
        if len(known) < len(everyone):
            raise EngineDead(f"no worker is known to serve {model!r:.200} yet", code="no_worker")
        names = ", ".join(repr(name) for name in sorted(self.models())[:20])
        raise NotFound(f"there is no model {model!r:.200}; served are {names}", param="model", code="model_not_found")

    def policy(self, model: str) -> Policy:
        """One for each model that is served, and one for all other names."""
        key = model if model in self._policies or any(model in w.models for w in self.workers.values()) else ""
        found = self._policies.get(key)
        if found is None:
            made = POLICIES.get(self.settings.policy)
            found = self._policies[key] = made(self.settings, self.cached, self._draw)
        return found

    # looking after them

    def start(self) -> None:
        for url in self.settings.worker_urls:
            self.add(url)
        for text in self.settings.prefill:
            url, port = prefill_of(text)
            self.add(url, role=PREFILL, bootstrap_port=port)
        for url in self.settings.decode:
            self.add(url, role=DECODE)

    async def asked(self, seconds: float) -> None:
        """Wait, for so long at most, until each server has been looked at once, well or not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for worker in list(self.workers.values()):
                    await worker.asked.wait()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for worker in list(self._followers):
            self._unfollow(worker)
        for worker in self.workers.values():
            worker.pool.close()
        await asyncio.sleep(0)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_after(self, worker: Worker) -> None:
        looks = 0
        while self.workers.get(worker.url) is worker:
            try:
                async with self._busy:
                    await self._look(worker, looks)
            except Exception:
                _log.exception("looking at worker %s failed", worker.url)
            worker.asked.set()
            looks += 1
            settled = worker.healthy and not worker.fails
            pause = self.settings.health_check_interval_secs
            await asyncio.sleep(min(LEAST_SECONDS, pause))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause if settled else min(SOON_SECONDS, pause)):
                    await worker.settle.wait()
            worker.settle.clear()

    async def _look(self, worker: Worker, looks: int) -> None:
        breaks = worker.breaks
        try:
            status, body = await self.get(worker, self.settings.health_check_endpoint)
        except UpstreamError as error:
            self._is_ill(worker, error.reason, gone=error.refused)
            return
        if status != 200:
            self._is_ill(worker, f"{self.settings.health_check_endpoint}: {status} {body[:200]!r}")
            return
        if worker.breaks != breaks:
            return  # it answered before it went
        worker.fails, worker.passes = 0, worker.passes + 1
        if not worker.models or worker.passes == 1 or not worker.healthy or looks % FACTS_EVERY == 0:
            problem = await self._ask_facts(worker)
            if worker.breaks != breaks:
                return
            if problem:
                self._is_ill(worker, problem)
                return
            self._follow(worker)
        load = await self.fetch(worker, "/v1/loads")
        loads = load.get("loads") if isinstance(load, dict) else None
        if isinstance(loads, list) and loads and isinstance(loads[0], dict):
            worker.learn(loads[0])
        if worker.breaks != breaks:
            return
        fresh = worker.requests == 0 and worker.passes == 1
        if not worker.healthy and (fresh or worker.passes >= self.settings.health_success_threshold):
            worker.healthy, worker.why = True, ""
            worker.breaker.reset()
            _log.info("worker %s serves %s", worker.url, ", ".join(worker.models) or "an unknown model")

    def _is_ill(self, worker: Worker, problem: str, gone: bool = False) -> None:
        if gone and worker.passes:
            self._forget(worker)  # whoever listens there again is another process
        worker.fails, worker.passes, worker.why = worker.fails + 1, 0, problem
        if worker.healthy and worker.fails >= self.settings.health_failure_threshold:
            worker.healthy = False
            _log.warning("worker %s is not well: %s", worker.url, problem)

    def faulty(self, worker: Worker) -> None:
        """It answered a request with a fault of its own."""
        worker.errors += 1
        worker.breaker.failed(asyncio.get_running_loop().time())

    def broke(self, worker: Worker, error: UpstreamError) -> None:
        """It gave no whole answer. One that is not even listening is asked no more until it is well again."""
        self.faulty(worker)
        worker.pool.drop_idle()
        worker.breaks += error.refused
        if error.refused and worker.healthy:
            worker.healthy, worker.passes, worker.fails, worker.why = False, 0, 1, error.reason
            _log.warning("worker %s is gone: %s", worker.url, error.reason)
            self._forget(worker)  # whoever listens there again is another process
        worker.settle.set()

    async def _ask_facts(self, worker: Worker) -> str:
        """What keeps it from being asked; "" where nothing does."""
        info = await self.fetch(worker, "/server_info")
        if isinstance(info, dict):
            worker.facts = {
                name: info.get(name) for name in ("version", "max_total_num_tokens", "page_size", "kv_events")
            }
        status, models = await self._asked(worker, "/v1/models")
        if status in (401, 403) and not worker.given_models:
            return f"/v1/models: {status}: it asks for another key than ours; --worker-api-key says which"
        if worker.given_models:
            worker.models = worker.given_models
        elif isinstance(models, dict) and isinstance(models.get("data"), list):
            worker.models = tuple(str(item["id"]) for item in models["data"] if isinstance(item, dict) and "id" in item)
        elif models is None and info is not None:
            worker.models = (ANY_MODEL,)
        return ""

    # their cache events

    def _follow(self, worker: Worker) -> None:
        about = worker.facts.get("kv_events")
        current = self._followers.get(worker)
        if not self.settings.kv_events or not isinstance(about, dict):
            self._unfollow(worker)
            return
        if current is not None and current[0] == about:
            return
        if importlib.util.find_spec("zmq") is None:
            if not self._told_zmq:
                _log.warning("servers publish cache events; following them needs pyzmq: pip install 'phloem[events]'")
            self._told_zmq = True
            return
        self._unfollow(worker)
        if about.get("bound") is False:
            text = "worker %s sends its cache events to %s and takes no subscribers: its cache is guessed at"
            self._followers[worker] = about, None
            _log.warning(text, worker.url, about.get("endpoint"))
            return

        async def dump() -> tuple[int, list[Any]] | None:
            found = await self.fetch(worker, "/kv_events/dump")
            return (int(found["sequence"]), found["events"]) if isinstance(found, dict) and "events" in found else None

        follower = Follower(self.cached, worker.bit, worker.host, about, dump)
        self._followers[worker] = about, asyncio.get_running_loop().create_task(follower.run())
        _log.info("following the cache events of %s", worker.url)

    def _unfollow(self, worker: Worker) -> None:
        found = self._followers.pop(worker, None)
        if found is not None and found[1] is not None:
            found[1].cancel()
        self.cached.forget(worker.bit)

    # asking them

    async def get(
        self,
        worker: Worker,
        path: str,
        method: str = "GET",
        body: bytes = b"",
        limit: float | None = None,
        key: str | None = None,
    ) -> tuple[int, bytes]:
        """A whole answer, within `limit` seconds; `key` is asked with where no other was set. Raises UpstreamError."""
        exchange = Exchange(asyncio.get_running_loop().time())
        key = self.settings.worker_api_key or key or self._key
        lines = [f"{method} {path} HTTP/1.1", f"host: {worker.host}:{worker.port}", "accept: application/json"]
        lines += [f"authorization: Bearer {key}"] if key else []
        lines += [f"content-length: {len(body)}"] if body or method == "POST" else []
        lines += ["content-type: application/json"] if body else []
        limit = limit or self.settings.health_check_timeout_secs
        try:
            async with asyncio.timeout(limit):
                await worker.pool.send(exchange, "\r\n".join([*lines, "\r\n"]).encode(), body)
                status, parts = await exchange.head(), list[bytes]()
                while part := await exchange.read():
                    parts.append(part)
                    if exchange.received > MOST_ANSWER:
                        raise UpstreamError(f"{path}: an answer of more than {MOST_ANSWER} bytes")
                return status, b"".join(parts)
        except TimeoutError:
            raise UpstreamError(f"{path}: no answer within {limit:g} s") from None
        finally:
            exchange.cancel()

    async def fetch(self, worker: Worker, path: str) -> Any:
        """What JSON says there; None where nothing useful does."""
        return (await self._asked(worker, path))[1]

    async def _asked(self, worker: Worker, path: str) -> tuple[int, Any]:
        """As `fetch`, with the status; 0 where there is none."""
        status = 0
        try:
            status, body = await self.get(worker, path)
            return status, msgspec.json.decode(body) if status == 200 else None
        except (UpstreamError, msgspec.DecodeError):
            return status, None
