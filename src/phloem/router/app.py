"""The gateway as an ASGI app: its own routes, and everything else passed on."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

import msgspec

from phloem.client.info import version
from phloem.client.request import new_id
from phloem.core.errors import BadRequest, EngineDead, PhloemError, Unauthorized
from phloem.router import ask as asks
from phloem.router.fleet import Fleet
from phloem.router.limits import Buckets, Gate, TooMany
from phloem.router.metrics import Metrics
from phloem.router.pairs import REGULAR, ROLES
from phloem.router.relay import Relay, Way, told
from phloem.router.settings import BOOTSTRAP_PORT
from phloem.server.bodies import BodyGate, BodyLimits, header, refuse
from phloem.server.errors import error_body, messages_error
from phloem.server.stream import encode
from phloem.utils import log
from phloem.utils.tracing import QUIET

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Receive, Scope, Send

    from phloem.router.settings import Settings
    from phloem.router.tokens import Tokens
    from phloem.utils.tracing import Tracer

    Handler = Callable[[Scope, bytes], Awaitable[tuple[int, Any]]]

_log = log.get("router")
_PLAIN = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
JSON = b"application/json"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"
OPEN_PATHS = frozenset(("/health", "/ready", "/ping", "/liveness", "/readiness"))
ADDED = "worker {} added"
# What is every server's business: it is sent to all of them.
EVERYWHERE = (
    "/flush_cache",
    "/reset_prefix_cache",
    "/clear_hicache_storage_backend",
    "/hicache/storage-backend/clear",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/load_lora_adapter",
    "/unload_lora_adapter",
)
EVERYWHERE_V1 = ("/v1/set_lora", "/v1/merge_lora_weights", "/v1/unmerge_lora_weights")  # under this name alone
EVERYWHERE_SECONDS = 120.0
# So are these, which may also be GET, and whose answers are handed on: files of traces, and counts.
_RECORD = "/{}_expert_distribution_record"
TOLD = ("/start_profile", "/stop_profile", *(_RECORD.format(verb) for verb in ("start", "stop", "dump")))
TOLD_SECONDS = 330.0  # a server has 300 to write a trace
# New weights and memory given back: every server must have them, or the next request is answered by others.
WEIGHTS = (
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/destroy_weights_update_group",
    "/begin_weight_update",
    "/end_weight_update",
    "/abort_weight_update",
    "/post_process_weights",
    "/update_weight_version",
    "/weights_checker",
    "/load_lora_adapter_from_tensors",
    "/load_lora_adapter_from_distributed",
    "/release_memory_occupation",
    "/resume_memory_occupation",
)
WEIGHTS_SECONDS = 900.0
# These cannot be one call: a group counts a server's ranks from its own offset, handles belong to one device, and a
# server's part in pairs is its own.
EACH_ITS_OWN = ("/init_weights_update_group", "/update_weights_from_ipc", "/collective_rpc", "/disaggregation_mode")


class AddWorker(msgspec.Struct):
    """`POST /workers`."""

    url: str
    model_id: str | None = None
    models: list[str] = []
    worker_type: str = REGULAR
    bootstrap_port: int | None = None
    priority: int = 0
    labels: dict[str, Any] = {}


class Changed(msgspec.Struct):
    """`PUT /workers/{id}`."""

    priority: int | None = None
    labels: dict[str, Any] | None = None


SPAN = "phloem.span"  # in the scope


class Router:
    """The app. `start` once its loop runs."""

    def __init__(
        self, settings: Settings, tokens: Tokens | None = None, seed: int | None = None, tracer: Tracer | None = None
    ) -> None:
        self.settings = settings
        self.tracer = tracer
        self.tokens = tokens
        self.fleet = Fleet(settings, seed)
        self.gate = Gate(settings)
        self.metrics = Metrics(self.fleet, self.gate)
        self.relay = Relay(settings, self.fleet, self.gate, self.metrics)
        self.draining = False
        self._buckets = Buckets(settings.rate_limit_tokens_per_second, settings.rate_limit_burst_tokens)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_key]
        self._sessions = tuple(name.lower().encode() for name in settings.session_headers)
        limits = BodyLimits(settings.max_payload_size, settings.max_bodies_bytes, settings.body_timeout)
        self._bounded = BodyGate(self._serve, limits, keeps=True)
        self._own: dict[tuple[str, str], Handler] = {
            ("GET", "/health"): self._health,
            ("GET", "/ready"): self._health,
            ("GET", "/readiness"): self._health,
            ("GET", "/ping"): self._alive,
            ("GET", "/liveness"): self._alive,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/workers"): self._workers,
            ("POST", "/workers"): self._add,
            ("GET", "/list_workers"): self._list,
            ("POST", "/add_worker"): self._add_by_url,
            ("POST", "/remove_worker"): self._remove_by_url,
            ("GET", "/get_loads"): self._loads,
            ("GET", "/v1/models"): self._models,
            ("GET", "/get_server_info"): self._info,
            ("GET", "/server_info"): self._info,
            **{("POST", prefix + path): self._everywhere for path in EVERYWHERE for prefix in ("", "/v1")},
            **{("POST", path): self._everywhere for path in EVERYWHERE_V1},
            ("GET", "/flush_cache"): self._everywhere,
            **{(method, path): self._told_everywhere for path in TOLD for method in ("GET", "POST")},
            **{("POST", path): self._weights_everywhere for path in WEIGHTS},
            **{("POST", path): self._each_its_own for path in EACH_ITS_OWN},
        }
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.fleet.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.fleet.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.settings.first_byte_timeout / 4, self.settings.stall_timeout / 4))
            self.relay.sweep(asyncio.get_running_loop().time())

    # a request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = header(scope, b"x-request-id")
        known = given is not None and _PLAIN.fullmatch(given) is not None
        scope["request_id"] = given.decode() if known and given is not None else new_id()
        if scope["path"].endswith("/") and scope["path"] != "/":
            # A server would send the client to its own address, past us.
            path = scope["path"].rstrip("/") or "/"
            scope["path"], scope["raw_path"] = path, quote(path).encode()
        if not known and given is not None:
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
        if self._keys and scope["path"] not in OPEN_PATHS and not self._allowed(scope):
            error = Unauthorized("the API key is missing or wrong: send Authorization: Bearer <key>")
            await refuse(error, scope, receive, send)
            return
        if self.tracer is None or scope["path"] in QUIET:
            await self._bounded(scope, receive, send)
            return
        # Not by a layer around `send`, past which answers are written.
        span = scope[SPAN] = self.tracer.begin(scope)
        try:
            await self._bounded(scope, receive, send)
        finally:
            span.end()

    def _allowed(self, scope: Scope) -> bool:
        digest = hashlib.sha256(_key(scope)).digest()
        return any([hmac.compare_digest(digest, key) for key in self._keys])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """With the whole body at hand."""
        loop, body = asyncio.get_running_loop(), b""
        if any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]):
            body = (await receive()).get("body", b"")
        route, way = scope["path"], None
        try:
            handler = self._handler(scope)
            if handler is not None:
                status, answer = await handler(scope, bytes(body))
                await _answer(send, scope, status, answer)
            else:
                asked = asks.read(route, scope["headers"], body, self._sessions)
                way = Way(scope, receive, send, asked, body, scope["request_id"], loop.time(), self._client(scope))
                body = b""  # the way has it, until it needs it no more
                await self._forward(way)
                status = way.status
        except PhloemError as error:
            status = error.status
            self.metrics.refused[str(error.code or error.kind)] += 1
            if way is None or not (way.started or way.left):
                await _answer_error(send, scope, error)
        except OSError:
            raise
        except Exception:
            _log.exception("request %s (%s %s) failed", scope["request_id"], scope["method"], scope["path"])
            status = 500
            if way is None or not way.started:
                await _answer_error(send, scope, PhloemError(f"internal error; request id {scope['request_id']}"))
        if SPAN in scope:
            scope[SPAN].end(status)
        known = route in asks.GENERATES or (scope["method"], route) in self._own
        self.metrics.requests[route if known else "other", status] += 1

    def _client(self, scope: Scope) -> str:
        """Whose limits count, where there are any: the key's, or the address's where there is none."""
        if self.settings.max_concurrent_requests < 0 and not self.settings.rate_limit_tokens_per_second:
            return ""
        key = _key(scope)
        return hashlib.sha256(key).hexdigest() if key else str((scope.get("client") or ("",))[0])

    async def _forward(self, way: Way) -> None:
        if self.draining:
            raise EngineDead("the gateway is shutting down", code="draining")
        asked = way.ask
        if self.settings.rate_limit_tokens_per_second:
            self._buckets.take(way.client, asked.tokens + asked.output, way.arrived)
        if self.tokens is not None and asked.ids is None:
            asked.ids = await self.tokens.ids(asked.path, way.body)
            if asked.ids is not None:
                asked.tokens = max(float(len(asked.ids)), 1.0)
        await self.relay.run(way)

    def _handler(self, scope: Scope) -> Handler | None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        found = self._own.get((method, scope["path"]))
        if found is None and scope["path"].startswith("/workers/"):
            return self._one_worker
        return found

    # its own routes

    async def _health(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        """200 while there is a worker to send to, and the gateway is not about to end."""
        workers = list(self.fleet.workers.values())
        ready = sum(worker.healthy for worker in workers)
        if self.draining:
            raise EngineDead("the gateway is shutting down", code="draining")
        if not ready:
            raise EngineDead(f"none of {len(workers)} workers is well", code="no_worker")
        return 200, {"status": "ok", "workers": len(workers), "ready": ready}

    async def _alive(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        return 200, {"status": "ok"}

    async def _metrics(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        return 200, self.metrics.render()

    async def _workers(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        workers = [told(worker) for worker in self.fleet.workers.values()]
        ready = sum(worker["is_healthy"] for worker in workers)
        stats = {f"{role}_count": sum(one["worker_type"] == role for one in workers) for role in ROLES}
        stats["healthy_count"] = ready
        return 200, {"workers": workers, "total": len(workers), "stats": stats}

    async def _add(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        asked = _decode(body, AddWorker)
        models = [*([asked.model_id] if asked.model_id else []), *asked.models]
        if asked.worker_type not in ROLES or (asked.worker_type != REGULAR) is not self.settings.paired:
            text = "prefill or decode" if self.settings.paired else REGULAR
            raise BadRequest(f"worker_type: here it is {text}", param="worker_type")
        port = asked.bootstrap_port or BOOTSTRAP_PORT
        worker = self.fleet.add(asked.url, models, asked.priority, asked.labels, asked.worker_type, port)
        about = {"status": "accepted", "worker_id": worker.id, "url": worker.url, "location": f"/workers/{worker.id}"}
        return 202, {**about, "message": ADDED.format(worker.url)}

    async def _add_by_url(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        worker = self.fleet.add(_query(scope, "url"))
        return 200, {"success": True, "message": ADDED.format(worker.url), "worker_id": worker.id}

    async def _remove_by_url(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        worker = self.fleet.remove(_query(scope, "url"))
        return 200, {"success": True, "message": f"worker {worker.url} removed"}

    async def _list(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        return 200, {"urls": list(self.fleet.workers)}

    async def _one_worker(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        name, method = scope["path"].removeprefix("/workers/"), scope["method"]
        if method == "DELETE":
            worker = self.fleet.remove(name)
            return 202, {"status": "accepted", "worker_id": worker.id, "message": f"worker {worker.url} removed"}
        worker = self.fleet.find(name)
        if method in ("PUT", "PATCH"):
            change = _decode(body, Changed)
            worker.priority = worker.priority if change.priority is None else change.priority
            worker.labels = worker.labels if change.labels is None else change.labels
        elif method not in ("GET", "HEAD"):
            raise BadRequest(f"{method} is not possible here")
        return 200, told(worker)

    async def _loads(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        """What each worker said last, and what we have sent there."""
        workers = self.fleet.workers.values()
        return 200, {
            "workers": [
                {"worker": worker.url, "load": worker.running, "pending_tokens": round(worker.pending), **worker.load}
                for worker in workers
            ]
        }

    async def _models(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        names = self.fleet.models()
        if not names:
            raise EngineDead("no worker has said yet which model it serves", code="no_worker")
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "phloem", "workers": len(workers)}
            for name, workers in sorted(names.items())
        ]
        return 200, {"object": "list", "data": data}

    async def _info(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        return 200, {
            "version": version(),
            "gateway": True,
            "policy": self.settings.policy,
            "workers": [told(worker) for worker in self.fleet.workers.values()],
        }

    async def _everywhere(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        """The same call at every worker; good where all of them say so."""
        status, answer, _ = await self._at_all(scope, body, EVERYWHERE_SECONDS)
        return status, answer

    async def _told_everywhere(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        """With what each of them answered."""
        status, answer, told = await self._at_all(scope, body, TOLD_SECONDS)
        return status, {**answer, "answers": told}

    async def _weights_everywhere(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        """With what each of them answered, and `message` as one server has it."""
        status, answer, told = await self._at_all(scope, body, WEIGHTS_SECONDS)
        said = {str(one["message"]): None for one in told.values() if isinstance(one, dict) and one.get("message")}
        return status, {**answer, "message": "; ".join(said), "answers": told}

    async def _each_its_own(self, scope: Scope, body: bytes) -> tuple[int, Any]:
        workers = ", ".join(worker.url for worker in self.fleet.workers.values())
        raise BadRequest(f"{scope['path']} differs from server to server: send it to each itself ({workers})")

    async def _at_all(self, scope: Scope, body: bytes, limit: float) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Status and answer, and the body of each worker's."""
        workers, query = list(self.fleet.workers.values()), scope["query_string"].decode("latin-1")
        if not workers:
            raise EngineDead("there is no worker that could be told", code="no_worker")
        path = scope["path"] + (f"?{query}" if query else "")
        key = _key(scope).decode("latin-1") or None
        calls = [self.fleet.get(worker, path, "POST", body, limit, key) for worker in workers]
        found = await asyncio.gather(*calls, return_exceptions=True)
        answers = {
            worker.url: str(answer) if isinstance(answer, BaseException) else answer[0]
            for worker, answer in zip(workers, found, strict=True)
        }
        said = set(answers.values())
        # What all refuse alike is the client's fault, and no reason to try again.
        alike = said.pop() if len(said) == 1 else 502
        status = alike if isinstance(alike, int) and 400 <= alike < 500 else 200 if alike == 200 else 502
        told = {
            worker.url: _read(answer[1])
            for worker, answer in zip(workers, found, strict=True)
            if not isinstance(answer, BaseException)
        }
        return status, {"success": status == 200, "workers": answers}, told


def _read(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None


def _decode(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise BadRequest(str(error)) from None


def _query(scope: Scope, name: str) -> str:
    found = parse_qs(scope["query_string"].decode("latin-1")).get(name)
    if not found:
        raise BadRequest(f"{name} is missing in the address", param=name)
    return found[0]


def _key(scope: Scope) -> bytes:
    scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
    return (token.strip() if scheme.lower() == b"bearer" else b"") or header(scope, b"x-api-key") or b""


async def _answer(
    send: Send, scope: Scope, status: int, answer: Any, more: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    raw = isinstance(answer, bytes)
    body = answer if raw else encode(answer)
    headers = [
        (b"content-type", TEXT if raw and not more else JSON),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", scope["request_id"].encode()),
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _answer_error(send: Send, scope: Scope, error: PhloemError) -> None:
    """In the shape of the route; with a time to come again where that may help."""
    body = error_body(error)
    if scope["path"].startswith("/v1/messages"):
        body = encode(messages_error(error, scope["request_id"]))
    after = error.after if isinstance(error, TooMany) else 1
    more = ((b"retry-after", b"%d" % after),) if error.retryable else ((b"cache-control", b"no-store"),)
    await _answer(send, scope, error.status, body, more)
