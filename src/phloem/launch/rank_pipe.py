"""A rank's end of the socket between it and the process that has started it."""

from __future__ import annotations

import socket

import msgspec

from phloem.launch.child import Said
from phloem.utils.ipc import READ_BYTES, Frames, frame


class RankPipe:
    """Args: the number of the descriptor that it was given."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._frames = Frames()
        self._ahead: list[bytes] = []

    def say(self, what: str, why: str = "", *, bytes_read: int = 0, seconds: float = 0.0, number: int = 0) -> None:
        self._socket.sendall(frame(msgspec.msgpack.encode(Said(what, why, bytes_read, seconds, number))))

    def next(self) -> bytes | None:
        """The next message; None when the other end has gone."""
        while not self._ahead:
            data = self._socket.recv(READ_BYTES)
            if not data:
                return None
            self._ahead += self._frames.cut(data)
        return self._ahead.pop(0)
