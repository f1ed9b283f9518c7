"""Two one-way ZMQ pipes between a server's processes; every message is one frame of bytes.

Endpoints are Unix sockets in a private directory, so that nobody else on the machine can connect.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import zmq
import zmq.asyncio

# A slow reader must not lose messages: the number in flight is bounded by the requests in flight, not here.
_UNBOUNDED = 0


class Endpoints:
    """A private directory with one address per direction; removed by `close`."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="phloem-"))
        self.to_engine = f"ipc://{self._directory}/to"
        self.from_engine = f"ipc://{self._directory}/from"

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


def _prepare(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
    socket.set_hwm(_UNBOUNDED)
    socket.setsockopt(zmq.LINGER, 0)


class DoorPipe:
    """The API process's ends: binds both, sends without blocking, receives as a coroutine."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._context = zmq.asyncio.Context()
        self._out = zmq.Context.instance().socket(zmq.PUSH)
        self._in = self._context.socket(zmq.PULL)
        _prepare(self._out)
        _prepare(self._in)
        self._out.bind(endpoints.to_engine)
        self._in.bind(endpoints.from_engine)

    def send(self, data: bytes) -> None:
        self._out.send(data, zmq.DONTWAIT)

    async def receive(self) -> bytes:
        return await self._in.recv()

    def close(self) -> None:
        self._out.close()
        self._in.close()
        self._context.term()


class EnginePipe:
    """The engine process's ends: connects both; receives in the loop's thread, sends from the same thread."""

    def __init__(self, to_engine: str, from_engine: str) -> None:
        context = zmq.Context.instance()
        self._in = context.socket(zmq.PULL)
        self._out = context.socket(zmq.PUSH)
        _prepare(self._in)
        _prepare(self._out)
        # The last messages (`Stopped`, `Failed`) must leave before the process does.
        self._out.setsockopt(zmq.LINGER, 2000)
        self._in.connect(to_engine)
        self._out.connect(from_engine)

    def send(self, data: bytes) -> None:
        self._out.send(data)

    def poll(self, timeout: float | None) -> list[bytes]:
        """Every message that is there; waits up to `timeout` seconds (None: without end) for the first."""
        if not self._in.poll(None if timeout is None else max(0, int(timeout * 1000 + 0.999))):
            return []
        found: list[bytes] = []
        while True:
            try:
                found.append(self._in.recv(zmq.DONTWAIT))
            except zmq.Again:
                return found

    def close(self) -> None:
        self._in.close()
        self._out.close()
