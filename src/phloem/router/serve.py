"""The gateway's process: listen, serve, drain at the first SIGTERM, stop."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING

import uvicorn

from phloem.core.config import log_format
from phloem.router.app import Router
from phloem.server.connections import bounded_protocol
from phloem.server.serve import BACKLOG, KEEP_ALIVE_SECONDS, LAST_BYTES_SECONDS, Server
from phloem.server.serve import run as run_loop
from phloem.utils import log, machine, tracing
from phloem.utils.say import say
from phloem.utils.sockets import bind
from phloem.utils.tracing import Tracer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from phloem.router.settings import Settings
    from phloem.router.tokens import Tokens

_log = log.get("router")

POLL = 0.02
FIRST_LOOK_SECONDS = 2.0  # that a silent server may keep a gateway from serving with the others


def run(settings: Settings, tokens: Tokens | None = None) -> int:
    """Serve until a signal; gives the process's exit status.

    Raises:
        ConfigError: a setting is wrong, or the address cannot be listened on.
    """
    log.configure(settings.log_level, form=log_format())
    if settings.otlp_traces_endpoint:
        tracing.check(settings.otlp_traces_endpoint)
    machine.allow_open_files()
    sock = bind(settings.host, settings.port)
    run_loop(lambda: _main(settings, tokens, sock))
    return 0


async def _main(settings: Settings, tokens: Tokens | None, sock: socket.socket) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    count = len(settings.worker_urls) + len(settings.prefill) + len(settings.decode)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def ready(port: int) -> None:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        _log.info("policy %s, %d workers", settings.policy, count)
        say(f"Routing to {count} workers at http://{host}:{port}")

    tracer = Tracer(settings.otlp_traces_endpoint, "phloem-router") if settings.otlp_traces_endpoint else None
    try:
        await serve(Router(settings, tokens, tracer=tracer), settings, sock, ready, stop)
    finally:
        if tracer is not None:
            tracer.close()


async def serve(
    router: Router, settings: Settings, sock: socket.socket, on_ready: Callable[[int], None], stop: asyncio.Event
) -> None:
    """Until `stop` is set; then nothing new is taken, and what is in flight ends within `drain_timeout`."""
    port: int = sock.getsockname()[1]
    config = uvicorn.Config(
        router,
        access_log=False,
        log_config=None,
        lifespan="off",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        loop="none",
        http=bounded_protocol(),
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=LAST_BYTES_SECONDS,
    )
    server = Server(config, lambda: on_ready(port), settings.header_timeout)
    await router.start()
    await router.fleet.asked(FIRST_LOOK_SECONDS)  # whoever reads that we are ready may ask at once
    stopper = asyncio.create_task(_stop(router, settings, server, stop))
    try:
        await server.serve(sockets=[sock])
    finally:
        stopper.cancel()
        await router.close()
        sock.close()


async def _stop(router: Router, settings: Settings, server: Server, stop: asyncio.Event) -> None:
    await stop.wait()
    router.draining = True
    _log.info("ending: %d requests are in flight", router.gate.inside)
    deadline = time.monotonic() + settings.drain_timeout
    while (router.gate.inside or router.gate.waiting) and time.monotonic() < deadline:
        await asyncio.sleep(POLL)
    server.should_exit = True
