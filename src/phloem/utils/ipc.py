"""Messages between a server's two processes: frames of bytes over one pair of connected Unix sockets.

A frame is its length (four bytes, little-endian) and its bytes. There is no address that anybody else could connect to,
and no thread in between: a frame is one system call on each side, for a token of a stream the larger part of its cost.
Neither side waits for the other: what its socket does not take at once is kept and sent later.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable
from time import monotonic
from typing import cast

HEADER = 4
READ_BYTES = 1 << 18
LAST_SECONDS = 2.0  # how long the engine's last messages may take to leave


class Frames:
    """Cuts what arrives into frames. `most`: bytes of the largest that is taken; None: of any size."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._rest = bytearray()

    def cut(self, data: bytes) -> list[bytes]:
        """The frames that are complete with this piece. Raises ValueError for one that is too large."""
        if not self._rest and len(data) >= HEADER and int.from_bytes(data[:HEADER], "little") == len(data) - HEADER:
            return [data[HEADER:]]  # one whole frame: nearly always
        self._rest += data
        found: list[bytes] = []
        at, rest = 0, self._rest
        while len(rest) - at >= HEADER:
            size = int.from_bytes(rest[at : at + HEADER], "little")
            if self.most is not None and size > self.most:
                raise ValueError(f"a frame of {size} bytes, more than {self.most}")
            end = at + HEADER + size
            if end > len(rest):
                break
            found.append(bytes(rest[at + HEADER : end]))
            at = end
        del rest[:at]
        return found


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(HEADER, "little") + data


class DoorPipe(asyncio.Protocol):
    """The API process's end, from a socket whose other end is the engine's.

    `send` never waits, and may be called before the event loop runs; everything else belongs to that loop.
    """

    def __init__(self, ours: socket.socket) -> None:
        self._ours = ours
        self._frames = Frames()
        self._early: list[bytes] = []
        self._transport: asyncio.WriteTransport | None = None
        self._take: Callable[[bytes], bool] | None = None
        self._ended: asyncio.Future[None] | None = None

    def send(self, data: bytes) -> None:
        """What is sent after the other end has gone is lost."""
        if self._transport is None:
            self._early.append(frame(data))
        elif not self._transport.is_closing():  # uvloop raises where asyncio is silent
            self._transport.write(frame(data))

    async def deliver(self, take: Callable[[bytes], bool]) -> None:
        """Give `take` every message as it comes, in the running event loop, until it answers False. Once only.

        Raises:
            EOFError: when the other end has gone and everything has been delivered.
            Exception: what `take` raises; nothing more is delivered then.
        """
        loop = asyncio.get_running_loop()
        self._take, self._ended = take, loop.create_future()
        await loop.create_unix_connection(lambda: self, sock=self._ours)
        await self._ended

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        else:
            self._ours.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # those of uvloop do not inherit from it
        self._transport.writelines(self._early)
        self._early = []

    def data_received(self, data: bytes) -> None:
        ended, take = self._ended, self._take
        assert ended is not None and take is not None
        try:
            for message in self._frames.cut(data):
                if ended.done():
                    return
                if not take(message):
                    ended.set_result(None)
        except Exception as error:
            ended.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(EOFError("the other end of the pipe has gone"))


class EnginePipe:
    """The engine process's end, from the number of the socket that it was given; used by the loop's thread alone."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        self._socket.set_inheritable(False)
        self._ready = select.poll()
        self._ready.register(self._socket, select.POLLIN)
        self._frames = Frames()
        self._unsent = bytearray()

    def send(self, data: bytes) -> None:
        """What is sent after the other end has gone is lost."""
        self._unsent += frame(data)
        self._flush()

    def poll(self, timeout: float | None) -> list[bytes]:
        """Every message that is there; waits up to `timeout` seconds (None: without end) for the first.

        Raises:
            EOFError: when the other end has gone.
        """
        if self._unsent:
            self._flush()
        found = self._read()
        if found or timeout == 0:
            return found
        until = None if timeout is None else monotonic() + timeout
        while not found:
            left = None if until is None else until - monotonic()
            if left is not None and left <= 0:
                break
            waits = select.poll()
            waits.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            waits.poll(None if left is None else left * 1000)
            self._flush()
            found = self._read()
        return found

    def close(self) -> None:
        """Send what is left, for as long as `LAST_SECONDS`, and close."""
        with contextlib.suppress(OSError):
            self._socket.settimeout(LAST_SECONDS)
            self._socket.sendall(self._unsent)
        self._socket.close()

    def _read(self) -> list[bytes]:
        found: list[bytes] = []
        while self._ready.poll(0):  # asked first: an exception for "nothing" costs more than the question
            try:
                data = self._socket.recv(READ_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                if found:
                    return found  # its end is told next time
                raise EOFError("the other end of the pipe has gone")
            found += self._frames.cut(data)
        return found

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
                return
            del self._unsent[:sent]
