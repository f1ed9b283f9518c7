"""One request on its way: a worker is chosen, tried, and its answer passed on byte for byte.

Another worker is tried only while nothing of an answer has gone to the client. Whatever happens the request's load is
taken off its worker, and its end is told: a stream that breaks ends with an error event which says that it may be sent
again.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phloem.core.errors import EngineDead, PhloemError
from phloem.router.limits import Gate, TooMany
from phloem.router.pairs import ALONE, DECODE, PAIRED, PREFILL, Side, with_room
from phloem.router.pairs import WHOLE as WHOLE_LOGPROBS
from phloem.router.pairs import choose as pair
from phloem.router.upstream import Exchange, UpstreamError
from phloem.server.bodies import BODY_DONE
from phloem.server.errors import MESSAGES_PATH, error_body, messages_error
from phloem.server.serve import ChunkWriter
from phloem.server.stream import DONE, encode
from phloem.utils import log

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from phloem.router.ask import Ask
    from phloem.router.fleet import Fleet
    from phloem.router.metrics import Metrics
    from phloem.router.policies._base import Chosen
    from phloem.router.settings import Settings
    from phloem.router.worker import Load, Worker
    from phloem.utils.tracing import Span

_log = log.get("router")

RETRIED = frozenset((408, 429, 500, 502, 503, 504))
BROKEN = frozenset((500, 502, 503, 504))  # what counts against a worker
SPAN = "phloem.span"  # of a request's scope, where it has one
CLIENT_KEY = b"x-client-key"
HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade", b"content-length", b"host", b"expect")
)  # fmt: skip
OWN = frozenset((b"date", b"server"))  # the gateway writes its own
WHOLE = 64 << 10  # an answer that has come whole and is no longer than this goes out at once


class WorkerFailed(PhloemError):
    """No worker gave an answer."""

    status = 503
    kind = "engine_unavailable"
    retryable = True


@dataclass
class Way:
    """A request and what has become of it."""

    scope: Scope
    receive: Receive
    send: Send
    ask: Ask
    body: bytes | bytearray
    key: str  # of the request
    arrived: float
    client: str = ""  # whose it is, for limits
    chosen: Chosen | None = None
    started: bool = False  # the client has its head
    status: int = 0
    tried: list[Worker] = field(default_factory=list)
    pairs: list[Worker] = field(default_factory=list)  # prefill servers that were tried
    exchange: Exchange | None = None
    left: bool = False  # the client has hung up
    waits: list[asyncio.Future[None]] = field(default_factory=list)  # for its turn

    def begin(self) -> None:
        """The client is told: nothing is tried again, and the body is held no longer."""
        self.started = True
        self.body, self.ask.prompt, self.ask.ids = b"", b"", None
        if (done := self.scope.get(BODY_DONE)) is not None:
            done()


class Relay:
    """Passes requests on to a fleet's workers."""

    def __init__(self, settings: Settings, fleet: Fleet, gate: Gate, metrics: Metrics) -> None:
        self.settings, self.fleet, self.gate, self.metrics = settings, fleet, gate, metrics
        self.flying: set[Exchange] = set()
        self._backoff = settings.retry_initial_backoff_ms / 1000

    async def run(self, way: Way) -> None:
        """Until the client has its answer or has gone. Raises PhloemError where it has nothing of one."""
        watch = asyncio.get_running_loop().create_task(self._watch(way))
        try:
            await self._in_turn(way)
        finally:
            watch.cancel()
            now = asyncio.get_running_loop().time()
            self.metrics.duration.observe(now - way.arrived)
            if self.settings.log_requests:
                self._log(way, now)

    async def _in_turn(self, way: Way) -> None:
        try:
            await self.gate.enter(way.ask.priority, way.client, way.waits)
        except asyncio.CancelledError:
            if way.left:
                return
            raise
        try:
            await self._tries(way)
        finally:
            self.gate.leave(way.client)

    async def _watch(self, way: Way) -> None:
        """End the exchange when the client hangs up."""
        while (await way.receive())["type"] != "http.disconnect":
            pass
        way.left = True
        self.metrics.left += not way.status or (way.exchange is not None and not way.exchange.done)
        for turn in way.waits:
            turn.cancel()
        if way.exchange is not None:
            way.exchange.cancel("the client has gone")

    async def _tries(self, way: Way) -> None:
        last, most = "", self.settings.tries
        for attempt in range(most):
            if way.left:
                return
            chosen = self.choose(way)
            if attempt:
                self.metrics.retries += 1
                await self._pause(attempt, chosen.worker in way.tried)
            way.tried.append(chosen.worker)
            begun, way.status = time.monotonic(), 0
            try:
                if await self._try(way, chosen, attempt + 1 == most):
                    return
                last = f"{chosen.worker.url} answered {way.status}"
            except UpstreamError as error:
                if way.left:
                    return
                last = f"{chosen.worker.url}: {error.reason}"
            finally:
                _trace(way, chosen, begun)
            _log.info("request %s: %s; attempt %d of %d", way.key, last, attempt + 1, most)
        raise WorkerFailed(f"no worker answered in {most} attempts; the last: {last}", code="worker_failed")

    def choose(self, way: Way) -> Chosen:
        """Among those that serve, first those that were not tried. Raises PhloemError where there are none."""
        now = asyncio.get_running_loop().time()
        policy = self.fleet.policy(way.ask.model)
        known = policy.asked(way.ask, self.fleet.candidates(way.ask.model))
        known = [worker for worker in known if worker.role != PREFILL or self.settings.paired]
        ready = [worker for worker in known if worker.serves(now)]
        if self.settings.paired:
            if not any(worker.role == DECODE for worker in ready):
                ready = []
            elif way.ask.path not in PAIRED:
                ready = [worker for worker in ready if worker.role == DECODE]
        if not ready:
            why = "; ".join(f"{worker.url}: {_why(worker, now)}" for worker in known[:4])
            raise EngineDead(f"no worker serves this now ({why})", code="no_worker")
        if self.settings.paired and way.ask.path in PAIRED:
            chosen = pair(way.ask, policy, ready, [*way.tried, *way.pairs])
        else:
            fresh = [worker for worker in ready if worker not in way.tried]
            chosen = policy.choose(way.ask, fresh or ready)
        if not way.tried:
            self._in_time(way, chosen)
        way.chosen = chosen
        return chosen

    def _in_time(self, way: Way, chosen: Chosen) -> None:
        """Refuse at once what would come too late. Raises TooMany."""
        limit = self.settings.slo_ttft_ms
        for name, value in way.scope["headers"]:
            if name == b"x-slo-ttft-ms" and value.isdigit():
                limit = float(value[:9])
        wait = chosen.worker.wait(max(way.ask.tokens - chosen.cached, 0.0))
        if limit and wait * 1000 > limit:
            text = f"the first token is predicted in {wait:.1f} s, and {limit / 1000:g} s are allowed"
            raise TooMany(text, wait - limit / 1000, code="too_late")

    async def _pause(self, attempt: int, again: bool) -> None:
        """Before a worker is asked again; another one is asked at once."""
        if not again:
            return
        settings = self.settings
        wait = min(
            self._backoff * settings.retry_backoff_multiplier ** (attempt - 1), settings.retry_max_backoff_ms / 1000
        )
        await asyncio.sleep(wait * (1 + settings.retry_jitter_factor * (random.random() * 2 - 1)))

    async def _try(self, way: Way, chosen: Chosen, last: bool) -> bool:
        """One attempt: True once the client has been answered. Raises UpstreamError before the first byte."""
        loop, worker = asyncio.get_running_loop(), chosen.worker
        exchange = way.exchange = Exchange(loop.time())
        body, side = self._both(way, chosen, exchange)
        prompt = 0.0 if chosen.prefill is not None else way.ask.tokens
        load = worker.take(prompt, way.ask.output, chosen.cached)
        worker.breaker.begun(exchange.began)
        self.metrics.sent[worker.url] += 1
        self.flying.add(exchange)
        if way.left:
            exchange.cancel("the client has gone")
        try:
            await worker.pool.send(exchange, self._head(way, worker, body), body)
            self.fleet.policy(way.ask.model).sent(way.ask, chosen.prefill or worker)
            if not way.tried[1:]:
                self.metrics.overhead.observe(loop.time() - way.arrived)
            way.status = await exchange.head()
            load.first()
            if way.status not in BROKEN:
                worker.breaker.answered()
            if way.status in BROKEN:
                self.metrics.failed[worker.url, f"status {way.status}"] += 1
                self.fleet.faulty(worker)
            if not last and (way.status in RETRIED or (way.status == 404 and way.ask.stored and self._others(way))):
                return False
            await self._pass_on(way, exchange, load)
            if way.status not in BROKEN and exchange.error is None:
                worker.breaker.succeeded()
            return True
        except UpstreamError as error:
            if not way.left and not (side is not None and side.refused):
                self._failed(worker, "refused" if error.refused else "broken", error)
            raise
        finally:
            if side is not None:
                side.end()
            worker.breaker.let_go()
            load.end()
            self.flying.discard(exchange)
            exchange.cancel()

    def _others(self, way: Way) -> bool:
        """Whether somebody has not been asked who might know."""
        return any(worker.healthy and worker not in way.tried for worker in self.fleet.candidates(way.ask.model))

    def _failed(self, worker: Worker, kind: str, error: UpstreamError) -> None:
        self.metrics.failed[worker.url, kind] += 1
        self.fleet.broke(worker, error)

    def _both(self, way: Way, chosen: Chosen, exchange: Exchange) -> tuple[bytes | bytearray, Side | None]:
        """The body that goes out, and where two servers get it, the half that is not answered with."""
        if self.settings.paired and way.ask.path in ALONE:
            return with_room(way.body, None), None
        if not self.settings.paired or way.ask.path not in PAIRED:
            return way.body, None
        body, prefill = with_room(way.body, chosen.prefill), chosen.prefill
        if prefill is None:
            return body, None
        load = prefill.take(way.ask.tokens, 1.0, chosen.prefill_cached)
        side = Side(prefill, Exchange(exchange.began), load)
        way.pairs.append(prefill)
        self.metrics.sent[prefill.url] += 1
        side.begin(self._head(way, prefill, body), body, exchange, self._half_failed)
        return body, side

    def _half_failed(self, side: Side) -> None:
        if side.error is not None:
            self._failed(side.worker, "refused" if side.error.refused else "broken", side.error)
        else:
            self.metrics.failed[side.worker.url, f"status {side.refused}"] += 1
            self.fleet.faulty(side.worker)

    def _head(self, way: Way, worker: Worker, body: bytes | bytearray) -> bytes:
        scope, key = way.scope, self.settings.worker_api_key
        path = scope.get("raw_path") or scope["path"].encode()
        query = scope["query_string"]
        method = b"GET" if scope["method"] == "HEAD" else scope["method"].encode()
        parts = [b"%b %b%b HTTP/1.1\r\nhost: %b:%d\r\n" % (
            method, path, b"?" + query if query else b"", worker.host.encode(), worker.port)]  # fmt: skip
        named, sent = False, b""
        for name, value in scope["headers"]:
            if key is not None and name in (b"authorization", b"x-api-key"):
                sent = value
                continue
            if name in HOP or name == CLIENT_KEY:
                continue
            named = named or name == b"x-request-id"
            parts.append(b"%b: %b\r\n" % (name, value))
        if not named:
            parts.append(b"x-request-id: %b\r\n" % way.key.encode())
        if key is not None:
            parts.append(b"authorization: Bearer %b\r\n" % key.encode())
        if sent:
            # Servers may give each client its part; its key is not theirs to know.
            parts.append(b"%b: %b\r\n" % (CLIENT_KEY, hashlib.sha256(sent).hexdigest()[:16].encode()))
        if worker.role == DECODE:
            parts.append(WHOLE_LOGPROBS + b": 1\r\n")
        if body or method not in (b"GET", b"DELETE"):
            parts.append(b"content-length: %d\r\n" % len(body))
        parts.append(b"\r\n")
        return b"".join(parts)

    async def _pass_on(self, way: Way, exchange: Exchange, load: Load) -> None:
        """Head and body, as they come."""
        now = asyncio.get_running_loop().time()
        self.metrics.first_byte.observe(now - way.arrived)
        self.metrics.prompt_tokens += way.ask.tokens
        self.metrics.cached_tokens += load.cached
        chunked = not any(name == b"content-length" for name, _ in exchange.headers)
        headers = [
            (name, value)
            for name, value in exchange.headers
            if name not in OWN and (name not in HOP or name == b"content-length")
        ]
        if not any(name == b"x-request-id" for name, _ in headers):
            headers.append((b"x-request-id", way.key.encode()))
        way.begin()
        try:
            await way.send({"type": "http.response.start", "status": way.status, "headers": headers})
            writer = ChunkWriter.of(way.send)
            exchange.hang_up = None if writer is None else writer.abort
            if chunked and not exchange.done and way.scope["method"] != "HEAD":
                exchange.sink = writer
            await self._body(way, exchange, chunked)
        except OSError:
            way.left = True  # the socket has gone
        self.metrics.bytes_relayed += exchange.received

    async def _body(self, way: Way, exchange: Exchange, chunked: bool) -> None:
        ended = b"\n\n"
        try:
            while part := await exchange.read():
                ended = part[-2:]
                if exchange.done and exchange.error is None and not way.left:
                    await way.send({"type": "http.response.body", "body": part, "more_body": False})
                    return
                await way.send({"type": "http.response.body", "body": part, "more_body": True})
        except UpstreamError as error:
            if way.left:
                return
            worker = way.tried[-1]
            self.metrics.broken_streams += 1
            self._failed(worker, "broken stream", error)
            _log.warning("request %s: %s broke off after %d bytes: %s", way.key, worker.url, exchange.received, error)
            if not chunked:
                raise ConnectionResetError(error.reason) from None  # a length was promised: only hanging up tells
            await way.send({"type": "http.response.body", "body": self._ending(way, exchange, ended, error)})
            return
        await way.send({"type": "http.response.body", "body": b"", "more_body": False})

    def _ending(self, way: Way, exchange: Exchange, ended: bytes, error: UpstreamError) -> bytes:
        """What closes a broken answer."""
        kind = next((value for name, value in exchange.headers if name == b"content-type"), b"")
        if not kind.startswith(b"text/event-stream"):
            return b""
        text = f"the worker broke off inside the answer: {error.reason}; send the request again"
        failed = WorkerFailed(text, code="worker_lost")
        # Whether the last event was whole is not known where bytes went past us; an empty line more harms nobody.
        before = b"\n\n" if exchange.sink is not None or ended != b"\n\n" else b""
        if way.ask.path.startswith(MESSAGES_PATH):
            return before + b"event: error\ndata: " + encode(messages_error(failed, way.key)) + b"\n\n"
        if way.ask.path.startswith("/v1/responses"):
            data = encode({"type": "error", "code": failed.code, "message": text, "param": None})
            return before + b"event: error\ndata: " + data + b"\n\n"
        return before + b"data: " + error_body(failed) + b"\n\n" + DONE

    def sweep(self, now: float) -> None:
        """End what has waited for too long. Called about once a second."""
        for exchange in list(self.flying):
            settings = self.settings
            silent, stuck = now - exchange.heard, now - exchange.taken_at
            # Whether it is the client that takes nothing.
            theirs = exchange.stuffed or exchange.done or exchange.error is not None
            if not exchange.status and now - exchange.began > settings.first_byte_timeout:
                exchange.cancel(f"no first byte within {settings.first_byte_timeout:g} s")
            elif theirs and min(silent, stuck) > settings.stall_timeout and exchange.hang_up is not None:
                exchange.hang_up()
            elif exchange.status and silent > settings.stall_timeout and not theirs:
                exchange.cancel(f"nothing came for {settings.stall_timeout:g} s")

    def _log(self, way: Way, now: float) -> None:
        chosen, exchange = way.chosen, way.exchange
        worker, why = (chosen.worker.url, chosen.why) if chosen else ("nobody", "-")
        seconds, sent = now - way.arrived, exchange.received if exchange else 0
        _log.info(
            "request %s: %s %s, %.0f tokens, to %s (%s), status %d, %d attempts, %.3f s, %d bytes%s",
            way.key, way.ask.path, way.ask.model or "-", way.ask.tokens, worker, why, way.status, len(way.tried),
            seconds, sent, ", client left" if way.left else "",
            extra=log.fields(
                request_id=way.key, path=way.ask.path, model=way.ask.model, predicted_tokens=round(way.ask.tokens),
                worker=worker, why=why, status=way.status, attempts=len(way.tried), seconds=round(seconds, 6),
                bytes=sent, client_left=way.left,
            ),
        )  # fmt: skip


def _why(worker: Worker, now: float) -> str:
    if worker.draining:
        return "is being removed"
    if not worker.healthy:
        return worker.why
    return f"its circuit is {worker.breaker.state(now)}"


def told(worker: Worker) -> dict[str, Any]:
    return worker.told(asyncio.get_running_loop().time())


def _trace(way: Way, chosen: Chosen, begun: float) -> None:
    """An attempt is over: a span of it, below that of the request."""
    span: Span | None = way.scope.get(SPAN)
    if span is None:
        return
    facts: dict[str, str | int] = {"server.address": chosen.worker.url, "phloem.attempt": len(way.tried)}
    facts["phloem.cached_tokens"] = int(chosen.cached)
    if chosen.prefill is not None:
        facts["phloem.prefill_server"] = chosen.prefill.url
    if way.status:
        facts["http.response.status_code"] = way.status
    span.child("attempt", begun, time.monotonic(), facts)
