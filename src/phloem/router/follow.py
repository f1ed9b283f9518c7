"""Following one server's cache events: subscribe, begin from a dump, close gaps, begin again after a restart."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from phloem.router.cached import Cached

    Dump = Callable[[], Awaitable[tuple[int, list[Any]] | None]]

_log = log.get("router")

ANY_HOST = ("*", "0.0.0.0", "[::]", "::", "")
SETTLE_SECONDS = 0.2  # until a subscription is known to the publisher
REPLAY_SECONDS = 5.0
AGAIN_SECONDS = 5.0
_decode = msgspec.msgpack.Decoder().decode


def endpoint_at(endpoint: str, host: str) -> str:
    """A publisher's endpoint as it is reached from here."""
    scheme, _, rest = endpoint.partition("://")
    place, _, port = rest.rpartition(":")
    if scheme != "tcp" or place not in ANY_HOST:
        return endpoint
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"


class Follower:
    """Keeps `cached` true for one worker, until it is cancelled."""

    def __init__(self, cached: Cached, bit: int, host: str, about: dict[str, Any], dump: Dump) -> None:
        self.cached, self.bit, self._dump = cached, bit, dump
        self._endpoint = endpoint_at(str(about.get("endpoint") or ""), host)
        replay = about.get("replay_endpoint")
        self._replay_at = endpoint_at(str(replay), host) if replay else None
        self._topic = str(about.get("topic") or "")
        self._next: int | None = None  # the number of the next message that is not known yet
        self._heard = -1  # the number of the last message that came by itself
        self._cut = False  # the connection broke: who publishes there now may be another process
        self.gaps = 0
        self.restarts = 0

    async def run(self) -> None:
        """Never returns by itself."""
        try:
            while True:
                try:
                    await self._follow()
                except Exception as error:
                    _log.warning("cache events of %s: %s: %s", self._endpoint, type(error).__name__, error)
                    self.cached.forget(self.bit)
                await asyncio.sleep(AGAIN_SECONDS)
        finally:
            self.cached.forget(self.bit)

    async def _follow(self) -> None:
        import zmq
        import zmq.asyncio

        context, watch = zmq.asyncio.Context(), None
        try:
            sub = context.socket(zmq.SUB)
            cuts = sub.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            watch = asyncio.get_running_loop().create_task(self._watch(cuts))
            sub.setsockopt(zmq.RCVHWM, 0)
            sub.setsockopt(zmq.LINGER, 0)
            sub.subscribe(self._topic.encode())
            sub.connect(self._endpoint)
            await asyncio.sleep(SETTLE_SECONDS)
            self._heard, self._cut = -1, False
            await self._begin(context)
            while True:
                frames = await sub.recv_multipart()
                if self._cut:
                    self._heard, self._cut, self.restarts = -1, False, self.restarts + 1
                    _log.info("cache events of %s: the connection broke, all is asked anew", self._endpoint)
                    await self._begin(context)
                await self._take(context, frames)
        finally:
            if watch is not None:
                watch.cancel()
            context.destroy(linger=0)

    async def _watch(self, cuts: Any) -> None:
        """A new process numbers its messages from 0, and may have passed the old one's number when we hear of it."""
        while True:
            await cuts.recv_multipart()
            self._cut = True
            self.cached.forget(self.bit)

    async def _begin(self, context: Any) -> None:
        """From the server's whole account, or from its first message on."""
        self.cached.forget(self.bit)
        self._next = None
        if not await self._dumped() and self._replay_at is not None:
            self._next = 0
            await self._replay(context)

    async def _dumped(self) -> bool:
        """All that is cached there, where the server tells it."""
        found = await self._dump()
        if found is None:
            return False
        self.cached.forget(self.bit)
        self._next, events = found
        self.cached.take(self.bit, events)
        return True

    async def _take(self, context: Any, frames: list[bytes]) -> None:
        if len(frames) < 2 or len(frames[-2]) != 8:
            return
        number = int.from_bytes(frames[-2], "big")
        began, self._heard = number <= self._heard, number
        if began:
            self.restarts += 1
            _log.info("cache events of %s: it has begun anew", self._endpoint)
            if number:
                await self._begin(context)  # its first message, which clears, has not come
            else:
                self._next = None
        if self._is_known(number):
            return
        if self._next is not None and number > self._next:
            self.gaps += 1
            _log.info("cache events of %s: %d are missing before %d", self._endpoint, number - self._next, number)
            if self._replay_at is None or not await self._replay(context):
                await self._begin(context)
            if self._is_known(number):
                return
        self._apply(number, frames[-1])

    def _is_known(self, number: int) -> bool:
        """A dump had it, or a replay."""
        return self._next is not None and number < self._next

    def _apply(self, number: int, payload: bytes) -> None:
        _, events, *_ = _decode(payload)
        self.cached.take(self.bit, events)
        self._next = number + 1

    async def _replay(self, context: Any) -> bool:
        """Ask for what is missing. False where not all of it could be had."""
        import zmq

        wanted = self._next or 0
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        try:
            sock.connect(self._replay_at)
            await sock.send_multipart([b"", wanted.to_bytes(8, "big")])
            async with asyncio.timeout(REPLAY_SECONDS):
                while True:
                    frames = await sock.recv_multipart()
                    number = int.from_bytes(frames[-2], "big", signed=True)
                    if number < 0:
                        return self._next is not None and self._next > wanted
                    if number != self._next:
                        return False  # older ones have been forgotten
                    self._apply(number, frames[-1])
        except TimeoutError:
            return False
        finally:
            sock.close()
