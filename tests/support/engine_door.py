"""HTTP in front of an engine in this process: one model serves both ways."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from phloem import Engine


@contextlib.contextmanager
def http_door(engine: Engine) -> Iterator[str]:
    """The address of an app over an engine that runs already."""
    from phloem.server.app import create_app
    from phloem.server.serve import serve

    started, box = threading.Event(), dict[str, Any]()

    async def main() -> None:
        stop = box["stop"] = asyncio.Event()

        def ready(host: str, port: int) -> None:
            box["url"] = f"http://{host}:{port}"
            started.set()

        await serve(create_app(engine._client, engine.config, engine.info), "127.0.0.1", 0, ready, stop)

    future = asyncio.run_coroutine_threadsafe(main(), engine._door.loop)
    assert started.wait(30)
    try:
        yield box["url"]
    finally:
        # Not `stop`: that would drain the engine's own client, which goes on.
        future.cancel()
        with contextlib.suppress(BaseException):
            future.result(10)
