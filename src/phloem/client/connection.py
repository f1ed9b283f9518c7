"""The life of the link to an engine: attached, ready, heard from, gone; and the calls that administer it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phloem.client.request import new_id
from phloem.core.errors import BadRequest, ConfigError, EngineDead, ModelLoadError, PhloemError
from phloem.core.messages import (
    Control,
    ControlReply,
    EngineLink,
    Failed,
    FromEngine,
    Heartbeat,
    Progress,
    Ready,
    Replica,
    Stats,
    Stopped,
    ToEngine,
)

if TYPE_CHECKING:
    Take = Callable[[FromEngine, float], None]
    End = Callable[[EngineDead, bool], None]

log = logging.getLogger("phloem.server")

ALIVE_POLL = 0.25  # seconds between looks at `EngineLink.alive`
LAST_WORDS = 0.5  # seconds that a dead engine's reason may still be on its way
# What the caller can mend; an engine that fails of anything else has died.
_MENDED: dict[str, type[PhloemError]] = {error.__name__: error for error in (BadRequest, ConfigError, ModelLoadError)}


class Connection:
    """It outlives its engine: when the link dies it is `dead` until `attach` brings a new one.

    Args:
        take: is given tokens and statistics, with the time.
        end: is told that the engine has gone, and whether that was meant.
    """

    def __init__(self, take: Take, end: End) -> None:
        self.dead: str | None = "no engine has been started"
        self.ready: dict[str, Any] | None = None  # `Ready.info`; None until the engine is ready
        self.failed: Failed | None = None  # how the engine of this link failed, in its own words
        self.stats = Stats()
        self.heartbeat = Heartbeat()
        self.heard_at = time.monotonic()  # of the last message from the engine
        self._take = take
        self._end = end
        self._link: EngineLink | None = None
        self._replies: dict[str, asyncio.Future[ControlReply]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._changed: asyncio.Event | None = None  # readiness or death: whoever waits looks again
        self._started = False

    def attach(self, link: EngineLink, ready: dict[str, Any] | None = None) -> None:
        """Serve through this link from now on. `ready`: the engine's `Ready.info`, where the caller has taken it."""
        if self._link is not None and self.dead is None:
            self.die("the engine was replaced", expected=True)
        self._release()
        self._link, self.dead, self.ready, self.failed = link, None, ready, None
        self.stats, self.heartbeat, self.heard_at = Stats(), Heartbeat(), time.monotonic()
        if self._started:
            self._spawn(link)

    def start(self) -> None:
        """Begin to receive. Call it inside the running event loop, once; links may be attached before or after."""
        self._started = True
        self._changed = asyncio.Event()
        if self._link is not None and self.dead is None:
            self._spawn(self._link)

    async def close(self) -> None:
        """Let go of the link."""
        if self.dead is None:
            self.die("the server is shutting down", expected=True)
        tasks = self._tasks
        self._release()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def failure(self) -> PhloemError | None:
        """What the engine of this link was asked wrongly, as the error that it raised there; None: it was not that."""
        kind = None if self.failed is None else _MENDED.get(self.failed.kind)
        return None if self.failed is None or kind is None else kind(self.failed.error, param=self.failed.param)

    async def wait_ready(self) -> dict[str, Any]:
        """Wait for the engine's `Ready`, and give its info. Raises EngineDead if it ends first."""
        while self.ready is None:
            if self.dead is not None:
                raise EngineDead(self.dead)
            assert self._changed is not None, "start() comes first"
            self._changed.clear()
            await self._changed.wait()
        return self.ready

    @property
    def replicas(self) -> list[Replica]:
        """The engines that there are, one at least."""
        several = [] if self._link is None or self.dead is not None else self._link.replicas
        return several or [Replica(stats=self.stats, ready=self.ready, problem=self.dead)]

    def send(self, message: ToEngine) -> None:
        """Raises EngineDead; the link may know of its engine's end before anything was received."""
        if self.dead is not None or self._link is None:
            raise EngineDead(self.dead or "no engine has been started")
        self._link.send(message)

    async def control(self, name: str, deadline: float | None, args: dict[str, Any]) -> ControlReply:
        """Raises EngineDead: there is no engine, or it gave no answer within `deadline` seconds."""
        key = new_id()
        future: asyncio.Future[ControlReply] = asyncio.get_running_loop().create_future()
        self._replies[key] = future
        try:
            self.send(Control(id=key, name=name, args=args))
            return await asyncio.wait_for(future, deadline)
        except TimeoutError:
            raise EngineDead(f"the engine did not answer {name!r} within {deadline:g} s") from None
        finally:
            self._replies.pop(key, None)

    def die(self, reason: str, expected: bool = False) -> None:
        """Harmless when repeated."""
        if self.dead is not None:
            return
        self.dead, self.ready, self.stats = reason, None, Stats()
        self._end(EngineDead(reason), expected)
        replies, self._replies = self._replies, {}
        for future in replies.values():
            if not future.done():
                future.set_exception(EngineDead(reason))
        self._notify()

    def _spawn(self, link: EngineLink) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._receive(link)), loop.create_task(self._watch(link))]

    def _release(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        if self._link is not None:
            self._link.close()
        self._link = None

    async def _receive(self, link: EngineLink) -> None:
        try:
            await link.deliver(self._deliver)
        except asyncio.CancelledError:
            raise
        except EngineDead as error:
            self.die(error.message)
        except Exception as error:
            log.exception("the link to the engine broke")
            self.die(f"the link to the engine broke: {type(error).__name__}: {error}")

    async def _watch(self, link: EngineLink) -> None:
        while link.alive:
            await asyncio.sleep(ALIVE_POLL)
        # A reason in the engine's own words is worth a moment.
        await asyncio.sleep(LAST_WORDS)
        self.die(link.end)

    def _deliver(self, message: FromEngine) -> bool:
        now = self.heard_at = time.monotonic()
        match message:
            case Heartbeat():
                self.heartbeat = message
            case ControlReply():
                future = self._replies.pop(message.id, None)
                if future is not None and not future.done():
                    future.set_result(message)
            case Ready():
                self.ready = message.info
                self._notify()
            case Progress():
                log.info("engine: %s took %.2f s", message.phase, message.seconds)
            case Failed():
                self.failed = message
                self.die(f"the engine failed: {message.kind or 'error'}: {message.error}")
            case Stopped():
                self.die("the engine has stopped")
            case Stats():
                self.stats = message
                self._take(message, now)
            case _:
                self._take(message, now)
        return self.dead is None

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
