"""What is looked at once a second: connections that never become a request, and whether sockets are left."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from phloem.utils import machine

log = logging.getLogger("phloem.server")

MAX_HEADER_BYTES = 65_536  # of one request: its first line and all its fields, trailers too


def bounded_protocol() -> Any:
    """What uvicorn speaks HTTP with; a request whose header is too long is answered 431 and its connection closed."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"  # bounds headers itself

    class Bounded(HttpToolsProtocol):
        _held = 0  # bytes since something came of them: the parser keeps what it has of a field
        _named = 0  # bytes of this message's fields

        def data_received(self, data: bytes) -> None:
            self._held += len(data)
            super().data_received(data)
            if self._held > MAX_HEADER_BYTES and not self.transport.is_closing():
                self._named = self._held
                self.send_400_response("")

        def on_message_begin(self) -> None:
            self._named = 0
            super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value) + 4)
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._held = 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._held = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._held = 0
            super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            if self._named <= MAX_HEADER_BYTES:
                return super().send_400_response(msg)
            text = b"the header of a request has at most %d bytes\n" % MAX_HEADER_BYTES
            head = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\nconnection: close\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(text) + text)
            self.transport.close()

        def _count(self, size: int) -> None:
            self._named += size
            if self._named > MAX_HEADER_BYTES:
                raise ValueError("the header is too long")  # the parser ends here, and `send_400_response` is called

    return Bounded


class SilentConnections:
    """Closes connections on which no whole header comes in time. Bodies have a limit of their own, and a connection
    between two requests uvicorn's."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._since: dict[Any, tuple[Any, float]] = {}  # connection -> its last request, and since when it waits

    def close(self, connections: Iterable[Any], now: float) -> None:
        """`connections`: uvicorn's protocols."""
        waiting: dict[Any, tuple[Any, float]] = {}
        for connection in connections:
            if _waits(connection):
                last, since = self._since.get(connection, (None, now))
                waiting[connection] = (connection.cycle, since if last is connection.cycle else now)
        self._since = waiting
        for connection, (_, since) in waiting.items():
            if now - since > self._timeout:
                connection.transport.close()


def _waits(connection: Any) -> bool:
    """Whether a header is due: the first one, or one of which a part has come."""
    cycle = connection.cycle
    return cycle is None or (cycle.response_complete and connection.timeout_keep_alive_task is None)


class FreeSockets:
    """Tells once when the process may open no more files: libuv then drops new connections in silence."""

    def __init__(self) -> None:
        self._told = False

    def look(self, connections: int) -> None:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            if not self._told:
                log.error(
                    "no more connections can be taken: %d are open, and the system allows this process %s files "
                    "(raise it with `ulimit -n`)",
                    connections,
                    machine.open_files(),
                )
            self._told = True
            return
        if self._told:
            log.info("connections are taken again")
        self._told = False
