"""Plain sockets: rows follow their `Pages` as bytes, of a number that both sides know."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import numpy as np

from phloem.utils import memory

if TYPE_CHECKING:
    from phloem.disagg.transports import Row
    from phloem.disagg.wire import Link

ANY_HOST = ("", "0.0.0.0", "::")
BUFFER_BYTES = 4 << 20


class Receiver:
    def __init__(self, row_bytes: int, count: int) -> None:
        self._block = memory.zeros(row_bytes * count).reshape(count, row_bytes)

    def greet(self, link: Link, seconds: float) -> None:
        pass

    def take(self, link: Link, start: int, count: int, seconds: float) -> None:
        link.read_into(self._block[start : start + count].reshape(-1).data, seconds)

    def row(self, index: int) -> Row:
        return self._block[index]

    def close(self) -> None:
        self._block = np.empty((0, 0), np.uint8)


class Sender:
    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._block = np.empty((0, row_bytes), np.uint8)

    def rows(self, start: int, count: int) -> list[Row]:
        if len(self._block) < count:
            self._block = np.empty((count, self._row_bytes), np.uint8)
        return list(self._block[:count])

    def push(self, link: Link, start: int, count: int, seconds: float) -> None:
        link.write(self._block[:count].reshape(-1).data, seconds)

    def close(self) -> None:
        pass


class Transport:
    name, near = "tcp", False

    def listen(self, host: str) -> tuple[socket.socket, str]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server(("" if host in ANY_HOST else host, 0), family=family, backlog=256)
        return sock, f"{'' if host in ANY_HOST else host}|{sock.getsockname()[1]}"

    def connect(self, address: str, host: str, seconds: float) -> socket.socket:
        named, _, port = address.rpartition("|")
        try:
            sock = socket.create_connection((named or host, int(port)), seconds)
        except ValueError as error:
            raise OSError(f"{address!r:.100} is no address: {error}") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        return sock

    def receiver(self, row_bytes: int, count: int) -> Receiver:
        return Receiver(row_bytes, count)

    def sender(self, link: Link, row_bytes: int, count: int, seconds: float) -> Sender:
        return Sender(row_bytes)
