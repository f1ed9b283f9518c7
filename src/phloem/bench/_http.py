"""HTTP for measuring: what arrives is only kept, with its time, and read when the answer is complete.

On a machine whose cores all compute, a client that works for each token is slower for the fastest server most. So there
is no general HTTP client between the socket and the clock.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

from phloem.core.errors import PhloemError

TIMEOUT_SECONDS = 3600.0


@dataclass
class Answer:
    """A complete answer. `pieces`: what the body's parts were, and the `perf_counter` at which each arrived."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)

    def lines(self) -> Iterator[tuple[float, bytes]]:
        """The body's lines without their ends, and when each was complete."""
        rest, now = b"", 0.0
        for now, data in self.pieces:
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield now, line.rstrip(b"\r")
        if rest:
            yield now, rest


class _Connection(asyncio.Protocol):
    """One connection and the one exchange that it is busy with."""

    def __init__(self) -> None:
        import httptools

        self._new_parser = lambda: httptools.HttpResponseParser(self)
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._answer = Answer()
        self._done: asyncio.Future[None] | None = None
        self._until_closed = True  # neither a length nor chunks: the answer ends with the connection
        self._now = 0.0
        self.reusable = False

    async def exchange(self, request: bytes) -> Answer:
        """Raises OSError (a connection that broke) or ValueError (no HTTP)."""
        assert self._transport is not None
        if self._transport.is_closing():
            raise ConnectionResetError("the server has closed the connection")
        self._answer, self._until_closed, self.reusable = Answer(), True, False
        self._parser = self._new_parser()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        return self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # those of uvloop do not inherit from it

    def data_received(self, data: bytes) -> None:
        import httptools

        self._now = perf_counter()
        if self._done is None or self._done.done():
            return  # nobody asked
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._done.set_exception(ValueError(f"no valid HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if exc is None and self._answer.status and self._until_closed:
            self._done.set_result(None)
        else:
            self._done.set_exception(exc or ConnectionResetError("the connection ended before the answer did"))

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._until_closed = False

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._answer.pieces.append((self._now, data))

    def on_message_complete(self) -> None:
        # An interim answer (1xx) precedes the one that counts.
        if self._answer.status >= 200 and self._done is not None and not self._done.done():
            self.reusable = self._parser.should_keep_alive()
            self._done.set_result(None)


class Http:
    """Exchanges with one server. `fresh`: each has a connection of its own; otherwise idle ones are used again."""

    def __init__(self, url: str, headers: Mapping[str, str], fresh: bool = False) -> None:
        try:
            import httptools  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError:
            raise PhloemError("this benchmark needs httptools: pip install 'uvicorn[standard]'") from None
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        fixed = {"Host": parts.netloc, "Accept": "*/*", **headers}
        if fresh:
            fixed["Connection"] = "close"
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())
        self._fresh = fresh
        self._idle: list[_Connection] = []

    async def exchange(self, method: str, path: str, body: Any = None) -> Answer:
        """Send `body` as JSON and wait for the whole answer.

        Raises:
            OSError: no connection, or one that broke; TimeoutError among them.
            ValueError: what came is no HTTP.
        """
        data = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else "Content-Type: application/json\r\n"
        length = "" if method == "GET" else f"Content-Length: {len(data)}\r\n"
        request = f"{method} {self._path}{path} HTTP/1.1\r\n{self._fixed}{kind}{length}\r\n".encode() + data
        async with asyncio.timeout(TIMEOUT_SECONDS):
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                answer = await connection.exchange(request)
            except BaseException:
                connection.close()
                raise
        if connection.reusable and not self._fresh:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


def run(main: Any) -> Any:
    """`asyncio.run` on uvloop where it is installed: half the cost for each event."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
