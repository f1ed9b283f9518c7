"""Spans of requests for OpenTelemetry, where a server or a gateway is asked for them.

Each HTTP request is a span, which goes on from what its `traceparent` says (W3C), and what it passes on goes on from
it: so a gateway's span has the server's below it, and below that lies what the engine did. OpenTelemetry is imported by
`Tracer` alone. Its SDK sends spans in the background, drops what it cannot get rid of, and reads the usual variables of
the environment (`OTEL_TRACES_SAMPLER`, `OTEL_RESOURCE_ATTRIBUTES`, ...).
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PARENT = b"traceparent"
STATE = b"tracestate"
# Asked again and again by machines, and of no use to anybody who looks for a slow request.
QUIET = frozenset(("/health", "/ready", "/ping", "/metrics", "/v1/loads", "/get_loads", "/get_load"))
SECONDS = 3.0  # that the collector gets for a batch, also of the last one, when a server ends
CURRENT: ContextVar[Span | None] = ContextVar("phloem.span", default=None)


class Span:
    """One that has begun, and the context that others go on from."""

    def __init__(self, tracer: Tracer, span: Any, context: Any) -> None:
        self._tracer, self._span, self.context = tracer, span, context
        self._ended = False

    @property
    def recorded(self) -> bool:
        """Whether anybody will see it: of many requests a sampler may choose a few."""
        return self._span.is_recording()

    def child(self, name: str, start: float, end: float, attributes: Mapping[str, Any]) -> Span:
        """What was done from `start` to `end`, in seconds of `time.monotonic`."""
        return self._tracer.past(self, name, start, end, attributes)

    def end(self, status: int = 0) -> None:
        """`status`: of the answer; 0: there was none. Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        if status:
            self._span.set_attribute("http.response.status_code", status)
        if not status or status >= 500:
            self._span.set_status(self._tracer.error)
        self._span.end()


class Tracer:
    """Args:
    endpoint: where an OpenTelemetry collector takes OTLP over HTTP: a URL, or HOST:PORT.
    service: what the spans are of.
    exporter: an exporter of the SDK that takes the spans instead.

    Raises:
        ConfigError: OpenTelemetry is not installed, or the endpoint is none.
    """

    def __init__(self, endpoint: str, service: str, exporter: Any = None) -> None:
        exporter = exporter or _to_collector(check(endpoint))
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace: Any = trace
        self._words: Any = TraceContextTextMapPropagator()
        self.provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("phloem")
        self.error: Any = trace.StatusCode.ERROR
        self._ahead = time.time_ns() - time.monotonic_ns()

    def begin(self, scope: Scope) -> Span:
        """The span of a request; what its `traceparent` is from now on is this span."""
        said = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
                if name in (PARENT, STATE)}  # fmt: skip
        above = self._words.extract(said)
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"][:200]}
        if "request_id" in scope:
            attributes["phloem.request_id"] = scope["request_id"]
        span = self._tracer.start_span(
            f"{scope['method']} {scope['path'][:200]}", above, self._trace.SpanKind.SERVER, attributes
        )
        context = self._trace.set_span_in_context(span, above)
        told: dict[str, str] = {}
        self._words.inject(told, context)
        scope["headers"] = [
            *(pair for pair in scope["headers"] if pair[0] not in (PARENT, STATE)),
            *((name.encode(), value.encode()) for name, value in told.items()),
        ]
        return Span(self, span, context)

    def past(self, parent: Span, name: str, start: float, end: float, attributes: Mapping[str, Any]) -> Span:
        """As `Span.child`."""
        begun, ended = (int(seconds * 1e9) + self._ahead for seconds in (start, max(start, end)))
        span = self._tracer.start_span(name, parent.context, attributes=dict(attributes), start_time=begun)
        context = self._trace.set_span_in_context(span, parent.context)
        span.end(ended)
        return Span(self, span, context)

    def close(self) -> None:
        """What has not been sent yet is, for as long as the SDK waits."""
        self.provider.shutdown()


class Traced:
    """ASGI: the span of each request, in `CURRENT` while it runs."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            await self.app(scope, receive, send)
            return
        span, status = self.tracer.begin(scope), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        before = CURRENT.set(span)
        try:
            await self.app(scope, receive, noted)
        finally:
            CURRENT.reset(before)
            span.end(status)


def _to_collector(url: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=url, timeout=SECONDS)


def check(endpoint: str) -> str:
    """The URL that spans go to. Raises ConfigError: there can be none."""
    url = _url(endpoint)
    try:
        names = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
        installed = all(find_spec(name) is not None for name in names)
    except ModuleNotFoundError:
        installed = False
    if not installed:
        raise ConfigError("otlp_traces_endpoint: pip install 'phloem[trace]'", param="otlp_traces_endpoint")
    return url


def _url(endpoint: str) -> str:
    """With a scheme, and with OTLP's path where none is said."""
    text = endpoint if "://" in endpoint else f"http://{endpoint}"
    try:
        parts = urlsplit(text)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        wrong, parts = True, None
    if wrong or parts is None:
        why = "is neither HOST:PORT nor an http URL"
        raise ConfigError(f"otlp_traces_endpoint: {endpoint!r:.200} {why}", param="otlp_traces_endpoint")
    return text if parts.path.strip("/") else text.rstrip("/") + "/v1/traces"
