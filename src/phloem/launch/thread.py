"""The engine in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from time import monotonic
from typing import TYPE_CHECKING

from phloem.core.errors import EngineDead
from phloem.core.messages import EngineLink, FromEngine, ToEngine
from phloem.launch.core import serve
from phloem.utils import log
from phloem.utils.queues import within

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config

_log = log.get("launch")


class EngineThread(EngineLink):
    """The engine in a thread of this process; `receive` runs in the event loop that first awaits it."""

    def __init__(self, config: Config, checkpoint: Checkpoint) -> None:
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(config, checkpoint), name="phloem-engine", daemon=True)
        self._thread.start()

    def _run(self, config: Config, checkpoint: Checkpoint) -> None:
        try:
            serve(config, checkpoint, self._send, self._poll)
        except Exception:
            _log.debug("the engine thread stops", exc_info=True)  # the door was told
        finally:
            self._ended.set()
            self._wake()

    def _send(self, message: FromEngine) -> None:
        self._outbox.put(message)
        self._wake()

    def _wake(self) -> None:
        loop, news = self._loop, self._news
        if loop is not None and news is not None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(news.set)

    def _poll(self, timeout: float | None) -> list[ToEngine]:
        found: list[ToEngine] = []
        try:
            found.append(within(self._inbox, timeout))
            while True:
                found.append(self._inbox.get_nowait())
        except queue.Empty:
            return found

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    def send(self, message: ToEngine) -> None:
        if not self.alive:
            raise EngineDead("the engine has stopped")
        self._inbox.put(message)

    async def receive(self) -> FromEngine:
        if self._news is None:
            self._news = asyncio.Event()
            self._loop = asyncio.get_running_loop()
        while True:
            # Cleared before the look: a message that comes in between sets it again.
            self._news.clear()
            try:
                return self._outbox.get_nowait()
            except queue.Empty:
                if not self.alive:
                    raise EngineDead("the engine has stopped") from None
            await self._news.wait()

    def close(self, timeout: float = 30.0) -> None:
        end = monotonic() + timeout
        self._thread.join(max(0.0, end - monotonic()))
