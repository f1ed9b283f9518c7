"""The life of a server: start an engine, open the port when it can serve, mind it, drain, stop.

Order at start (`start.py`): the engine process is launched first (it imports torch and loads weights), this process
meanwhile checks the checkpoint, builds the tokenizer and the app; no port is opened before the engine says that it is
ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phloem.client.start import make_client
from phloem.core.errors import EngineDead, PhloemError
from phloem.core.messages import Drain, EngineLink
from phloem.server.app import create_app
from phloem.server.greet import greet
from phloem.server.health import Health
from phloem.server.serve import serve
from phloem.utils import garbage, log, memory
from phloem.utils.say import say
from phloem.utils.tracing import Tracer

if TYPE_CHECKING:
    from fastapi import FastAPI

    from phloem.client.client import EngineClient
    from phloem.client.info import ModelInfo
    from phloem.core.config import Config
    from phloem.server.videos.folder import FilmFolder

_log = log.get("server")

RESTART_WINDOW = 600.0  # seconds in which `max_engine_restarts` are counted
ENGINE_LEAVE_SECONDS = 5.0
HANG_POLL = 1.0  # seconds between looks at an engine that may hang
StartEngine = Callable[[], EngineLink]


def run(
    config: Config,
    engine: EngineLink,
    sock: socket.socket,
    start_engine: StartEngine,
    began: float,
    films: FilmFolder | None = None,
    refused: Callable[[str], None] = lambda why: None,
) -> int:
    """Serve until a signal; returns the process's exit status. Engine and socket are closed in every case.

    Args:
        config: resolved.
        engine: the first one, started a moment ago.
        sock: bound, and not yet listening.
        start_engine: makes the next ones.
        began: when the start began, by `time.perf_counter`.
        films: where films are kept, taken before the engine was started.
        refused: told why there is no start, by what the engine has nothing to do with.

    Raises:
        PhloemError: the configuration or the checkpoint is wrong; no port was opened.
    """
    try:
        phases = log.Phases()
        with phases.phase("door"), garbage.left_alone():
            client, info, _ = make_client(config)
            endpoint = config.server.otlp_traces_endpoint
            tracer = Tracer(endpoint, "phloem") if endpoint else None
            app = create_app(client, config, info, tracer, films)
        supervisor = _Supervisor(config, start_engine, client, info, began, phases, app, tracer)
    except BaseException as error:
        engine.close()
        sock.close()
        if isinstance(error, PhloemError):
            refused(error.message)
        raise
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(supervisor.serve(engine, sock))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class _Supervisor:
    def __init__(
        self,
        config: Config,
        start_engine: StartEngine,
        client: EngineClient,
        info: ModelInfo,
        began: float,
        phases: log.Phases,
        app: FastAPI,
        tracer: Tracer | None,
    ) -> None:
        self._config = config
        self._app, self._tracer = app, tracer
        self._start_engine = start_engine
        self._client = client
        self._info = info
        self._began = began
        self._phases = phases
        self._stop = asyncio.Event()  # leave now
        self._died = asyncio.Event()
        self._restarts: list[float] = []
        self._status = 0
        self._engine: EngineLink | None = None

    async def serve(self, engine: EngineLink, sock: socket.socket) -> int:
        client, server, tracer = self._client, self._config.server, self._tracer
        client.on_death.append(lambda _: self._died.set())
        self._engine = engine
        client.attach(engine)
        client.start()
        self._catch_signals()
        try:
            ready = await self._wait_ready()
        except EngineDead as error:
            await client.close()
            if tracer is not None:
                tracer.close()
            sock.close()
            if self._stop.is_set():
                return 130
            raise client.connection.failure or PhloemError(error.message) from None
        minders = [asyncio.create_task(self._mind()), asyncio.create_task(self._end_hung())]
        gc.freeze()  # what lives as long as the server need not be looked through between two tokens

        def announce(host: str, port: int) -> None:
            self._announce(ready, host, port)
            memory.release_libraries()

        try:
            await serve(self._app, server.host, server.port, announce, self._stop, sock)
            await self._end_engine()
        finally:
            for minder in minders:
                minder.cancel()
            await client.close()
            if tracer is not None:
                tracer.close()
        return self._status

    async def _wait_ready(self) -> dict[str, Any]:
        waiting = asyncio.ensure_future(self._client.wait_ready())
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not waiting.done():
            waiting.cancel()
            raise EngineDead("stopped while starting")
        return waiting.result()

    # Signals: the first SIGTERM or Ctrl-C lets running requests finish, the second cuts them off.

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            _log.warning("%s again: %d requests are cut off", number.name, self._client.in_flight)
            self._client.abort(everything=True)
            return
        if self._client.in_flight:
            _log.info("%s: finishing %d requests (again to stop at once)", number.name, self._client.in_flight)
        self._stop.set()

    async def _end_engine(self) -> None:
        """Let the engine leave by itself; `close` ends one that does not."""
        if self._client.dead is not None or self._engine is None or self._client.connection.ready is None:
            return  # one that starts reads no message
        with contextlib.suppress(EngineDead, TimeoutError):
            self._engine.send(Drain(timeout=0.0))
            await asyncio.wait_for(self._died.wait(), ENGINE_LEAVE_SECONDS)

    # The engine's death

    async def _mind(self) -> None:
        while True:
            await self._died.wait()
            self._died.clear()
            if self._stop.is_set():
                return
            if not await self._restart():
                self._status = 1
                self._stop.set()
                return

    async def _end_hung(self) -> None:
        """An engine that hangs is declared dead: its requests are answered, and `_mind` starts the next one."""
        limit = self._config.server.engine_hang_timeout
        if limit <= 0:
            return
        health = Health(self._client, self._config.schedule.watchdog_timeout)
        poll = min(HANG_POLL, limit / 4)
        looked = since = time.monotonic()
        while True:
            await asyncio.sleep(poll)
            now = time.monotonic()
            if now - looked > poll + limit / 2:
                since = now  # this process slept too (Ctrl-Z): the engine may be about to speak
            looked = now
            hung = min(health.hung(), now - since)
            if hung > limit:
                _log.error("the engine has been hanging for %.0f s: it is ended", hung)
                self._client.connection.die(f"the engine hung for {hung:.0f} s and was ended")

    async def _restart(self) -> bool:
        server = self._config.server
        if server.on_engine_death == "exit":
            _log.error("the engine is gone; leaving, as configured")
            return False
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < RESTART_WINDOW]
        if len(self._restarts) >= server.max_engine_restarts:
            _log.error("the engine died %d times within ten minutes; giving up", len(self._restarts) + 1)
            return False
        self._restarts.append(now)
        _log.warning("starting the engine again (%d of %d)", len(self._restarts), server.max_engine_restarts)
        self._engine = self._start_engine()
        self._client.attach(self._engine)
        try:
            await self._client.wait_ready()
        except EngineDead:
            return True  # its death wakes us again, and counts
        _log.info("the engine serves again after %.1f s", time.monotonic() - now)
        return True

    def _announce(self, ready: dict[str, Any], host: str, port: int) -> None:
        phases = {**ready.get("phases", {}), **{f"{k} (in parallel)": v for k, v in self._phases.seconds.items()}}
        decisions = [*ready.get("decisions", []), *self._info.decisions]
        width = max((len(name) for name, _, _ in decisions), default=0)
        lines = [f"  {name:<{width}}  {value!s:<12}  {reason}" for name, value, reason in decisions]
        _log.info("decisions:\n%s", "\n".join(lines))
        _log.info("start-up: %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items()))
        _log.info("ready after %.2f s", time.perf_counter() - self._began)
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(f"Serving {self._info.served_model_name} at {address}")
        if self._config.server.greet and self._info.task == "generate":
            self._greeting = asyncio.create_task(
                greet(address, self._info.served_model_name, self._config.server.api_key)
            )
