"""HTTP/1.1 to one server: kept connections, whose answers are passed on as they arrive.

A connection is an `asyncio.Protocol` around httptools' parser; an answer is an `Exchange`. Its bytes go to a `sink`
where that takes them (the client's own connection), and wait in the exchange otherwise: never more than `MOST_HELD`,
behind which the server's connection is read no further.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, cast

import httptools

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_HELD = 256 << 10  # bytes of an answer that wait for a slow client
MOST_HEADER_BYTES = 64 << 10
IDLE_SECONDS = 50.0  # a kept connection is used no longer than this behind its last answer
MOST_IDLE = 256

Headers = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """The server gave no answer, or not all of it."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.refused = refused  # no connection came about: it never saw the request


class Exchange:
    """One request and its answer. One task waits for it."""

    __slots__ = ("_buffered", "_connection", "_held", "_waiter", "began", "done", "error", "hang_up", "headers",
                 "heard", "received", "sink", "status", "taken_at")  # fmt: skip

    def __init__(self, now: float) -> None:
        self.status = 0
        self.headers: Headers = []
        self.done = False
        self.error: UpstreamError | None = None
        self.began = self.heard = now  # by the loop's clock
        self.received = 0  # bytes of the body
        self.sink: Callable[[bytes], bool] | None = None
        self.hang_up: Callable[[], None] | None = None  # on the client
        self.taken_at = now  # when something that waited was last taken for the client
        self._buffered: deque[bytes] = deque()
        self._held = 0
        self._waiter: asyncio.Future[None] | None = None
        self._connection: Connection | None = None

    def attach(self, connection: Connection) -> None:
        self._connection = connection

    async def head(self) -> int:
        """The status, once the head and the first bytes behind it are there, or the end. Raises UpstreamError."""
        while not self._buffered and not self.done and self.error is None:
            await self._wait()
        if self.error is not None and not self._buffered:
            raise self.error
        return self.status

    async def read(self) -> bytes:
        """All that waits; b"" at the end. Raises UpstreamError where the answer is cut off."""
        while not self._buffered:
            if self.error is not None:
                raise self.error
            if self.done:
                return b""
            await self._wait()
        return self.taken()

    def taken(self) -> bytes:
        """What waits, without waiting."""
        found = self._buffered.popleft() if len(self._buffered) == 1 else b"".join(self._buffered)
        self._buffered.clear()
        self._held, self.taken_at = 0, asyncio.get_running_loop().time()
        if self._connection is not None:
            self._connection.go_on()
        return found

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    @property
    def stuffed(self) -> bool:
        """Something waits for the client: it is not the server that is silent."""
        return bool(self._buffered)

    def cancel(self, reason: str = "cancelled") -> None:
        """Hang up, unless the answer is whole. Harmless when repeated."""
        if not self.done and self.error is None:
            self.fail(UpstreamError(reason))
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    # what the connection says

    def data(self, body: bytes, now: float) -> bool:
        """False where it should read no further."""
        self.heard = now
        if self.sink is not None and not self._buffered and self.sink(body):
            self.received += len(body)
            return True
        self._keep(body)
        self._wake()
        return self._held < MOST_HELD

    def end(self, rest: bytes = b"") -> None:
        """`rest`: its last bytes, which go out together with the end."""
        if rest:
            self._keep(rest)
        self.done, self._connection = True, None
        self._wake()

    def _keep(self, body: bytes) -> None:
        self.received += len(body)
        self._buffered.append(body)
        self._held += len(body)

    def fail(self, error: UpstreamError) -> None:
        if self.error is None and not self.done:
            self.error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection(asyncio.Protocol):
    """To one server; carries one exchange after the other."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._loop = pool, asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._parts: list[bytes] = []  # of the body, from what is being read
        self._paused = False
        self._header_bytes = 0
        self._unread = 0  # bytes that came since the parser had something whole: it keeps a line that does not end
        self.used = 0  # requests it has carried
        self.idle_since = 0.0

    @property
    def usable(self) -> bool:
        transport = self._transport
        return transport is not None and not transport.is_closing() and self._exchange is None

    def begin(self, exchange: Exchange, head: bytes, body: bytes | bytearray) -> None:
        assert self._transport is not None
        self._exchange, self._header_bytes, self._unread = exchange, 0, 0
        self._parts.clear()
        self.used += 1
        exchange.attach(self)
        if len(body) < 1 << 16:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def go_on(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def cut(self, reason: str) -> None:
        """As `abort`, and whoever waits for an answer here is told why there is none."""
        self._fail(reason)
        self.abort()

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._unread += len(data)
            self._parser.feed_data(data)
            if self._unread > MOST_HEADER_BYTES:
                raise ValueError(f"{self._unread} bytes neither end its header nor belong to its body")
            self._pass_on()
        except (httptools.HttpParserError, ValueError) as error:
            self._fail(f"the server's answer is no HTTP: {error}")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        exchange = self._exchange
        if exchange is not None and exc is None and exchange.status and not self._framed():
            self._exchange = None
            exchange.end()  # an answer without a length ends with its connection
        else:
            self._fail("the server closed the connection" if exc is None else f"the connection broke: {exc}")
        self._transport = None
        self._pool.lost(self)

    def _framed(self) -> bool:
        exchange = self._exchange
        names = (b"content-length", b"transfer-encoding")
        return exchange is not None and any(name in names for name, _ in exchange.headers)

    def _fail(self, reason: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.fail(UpstreamError(reason))

    # httptools

    def on_message_begin(self) -> None:
        if self._exchange is None:
            raise ValueError("an answer to no request")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MOST_HEADER_BYTES:
            raise ValueError(f"its header has more than {MOST_HEADER_BYTES} bytes")
        if self._exchange is not None:
            self._exchange.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        exchange, status = self._exchange, self._parser.get_status_code()
        if exchange is None:
            return
        if status < 200:
            exchange.headers.clear()  # 100 Continue and its like
            return
        self._unread = 0
        exchange.status = status
        exchange.heard = self._loop.time()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        self._parts.append(body)

    def on_message_complete(self) -> None:
        exchange = self._exchange
        if exchange is None or not exchange.status:
            return
        self._exchange, self._unread = None, 0
        keeps = self._parser.should_keep_alive()
        self.go_on()
        exchange.end(self._taken())
        self._pool.give_back(self, keeps)

    def _pass_on(self) -> None:
        """All that one read has brought, at once."""
        exchange = self._exchange
        if not self._parts or exchange is None:
            return
        if not exchange.data(self._taken(), self._loop.time()) and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _taken(self) -> bytes:
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Pool:
    """Connections to one server; the last one used is used first."""

    def __init__(self, host: str, port: int, connect_timeout: float) -> None:
        self._host, self._port, self._timeout = host, port, connect_timeout
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._closed = False

    async def send(self, exchange: Exchange, head: bytes, body: bytes | bytearray) -> None:
        """Begin the exchange. Raises UpstreamError, `refused`."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and exchange.began - connection.idle_since < IDLE_SECONDS:
                connection.begin(exchange, head, body)
                return
            connection.abort()
        connection = await self._connect()
        if not connection.usable:
            raise UpstreamError("the server closed the connection at once")
        connection.begin(exchange, head, body)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                _, connection = await loop.create_connection(lambda: Connection(self), self._host, self._port)
        except TimeoutError:
            raise UpstreamError(f"no connection within {self._timeout:g} s", refused=True) from None
        except OSError as error:
            raise UpstreamError(f"no connection: {error.strerror or error}", refused=True) from None
        except ValueError as error:  # of the resolver: the name is none
            raise UpstreamError(f"no connection: {error}", refused=True) from None
        if self._closed:
            connection.abort()
            raise UpstreamError("the server has been removed", refused=True)
        self._open.add(connection)
        return connection

    def drop_idle(self) -> None:
        """Forget kept connections: their server has just broken others."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()

    def give_back(self, connection: Connection, keeps: bool) -> None:
        if keeps and not self._closed and len(self._idle) < MOST_IDLE and connection.usable:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.abort()

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Cuts off what is in flight."""
        self._closed = True
        for connection in list(self._open):
            connection.cut("the server has been removed")
