"""Listen, serve, stop: the HTTP server around an app."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import uvicorn

from phloem.server.connections import FreeSockets, SilentConnections, bounded_protocol
from phloem.server.stream import BODY_SEND, BODY_WRITE
from phloem.utils.sockets import bind

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

BACKLOG = 2048
LAST_BYTES_SECONDS = 3  # after the drain: for answers that are still being written
KEEP_ALIVE_SECONDS = 75  # longer than the pools of usual clients and gateways keep a connection idle
POLL = 0.02
TICKS_A_SECOND = 10  # of uvicorn's main loop


class Server(uvicorn.Server):
    """Leaves signals to the caller and tells when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], header_timeout: float) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._silent = SilentConnections(header_timeout)
        self._sockets = FreeSockets()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_A_SECOND == 0:
            connections = self.server_state.connections
            self._silent.close(connections, time.monotonic())
            self._sockets.look(len(connections))
        return await super().on_tick(counter)


async def serve(
    app: FastAPI,
    host: str,
    port: int,
    on_ready: Callable[[str, int], None],
    stop: asyncio.Event,
    sock: socket.socket | None = None,
) -> None:
    """Serve until `stop` is set; then refuse new requests, let those in flight end, and return.

    `on_ready(host, port)` is called once the socket listens, with the real port. `sock`: one that `bind` made earlier,
    so that a taken port is reported before a model is loaded.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    bound = sock if sock is not None else bind(host, port)
    real_port: int = bound.getsockname()[1]
    config = uvicorn.Config(
        _with_body_send(app),
        access_log=False,
        log_config=None,
        lifespan="off",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        loop="none",  # the caller's loop is running already
        http=bounded_protocol(),
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=LAST_BYTES_SECONDS,
    )
    server = Server(config, lambda: on_ready(host, real_port), app.state.door.config.server.header_timeout)
    stopper = asyncio.create_task(_stop(app, server, stop))
    try:
        await server.serve(sockets=[bound])
    finally:
        stopper.cancel()
        bound.close()


class ChunkWriter:
    """Writes a part of a body that goes out in chunks straight to the transport, as uvicorn's `send` would: for an
    event of a stream that is half of the work. Any doubt is an answer of False."""

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: Any) -> None:
        self._cycle, self._flow, self._write = cycle, cycle.flow, cycle.transport.write

    @staticmethod
    def of(send: Any) -> ChunkWriter | None:
        """From the `send` that uvicorn gives; None for that of another server, or of an implementation with no such
        parts."""
        cycle = getattr(send, "__self__", None)
        parts = ("disconnected", "chunked_encoding", "response_complete", "transport")
        known = all(hasattr(cycle, part) for part in parts) and hasattr(getattr(cycle, "flow", None), "write_paused")
        return ChunkWriter(cycle) if known else None

    def abort(self) -> None:
        """Hang up, whatever waits to be sent."""
        self._cycle.transport.abort()

    def __call__(self, data: bytes) -> bool:
        cycle = self._cycle
        if self._flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        self._write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


def _with_body_send(app: ASGIApp) -> ASGIApp:
    """The app, told of the server's own `send`: a stream's events need not pass through every layer."""

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        scope[BODY_SEND] = send
        if (write := ChunkWriter.of(send)) is not None:
            scope[BODY_WRITE] = write
        await app(scope, receive, send)

    return outermost


async def _stop(app: FastAPI, server: uvicorn.Server, stop: asyncio.Event) -> None:
    await stop.wait()
    door = app.state.door
    if not await door.client.drain(door.config.server.drain_timeout):
        door.client.abort(everything=True)
    deadline = time.monotonic() + LAST_BYTES_SECONDS
    while server.server_state.tasks and time.monotonic() < deadline:
        await asyncio.sleep(POLL)
    server.should_exit = True


def run(main: Callable[[], object]) -> None:
    """`asyncio.run` on uvloop where it is installed."""
    factory = None
    if importlib.util.find_spec("uvloop"):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())  # pyright: ignore[reportArgumentType]
