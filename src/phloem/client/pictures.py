"""Pictures in flight: what the engine tells of each goes to the call that asked for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from phloem.client.call import ClientGone
from phloem.core.errors import BadRequest, EngineDead, OutOfMemory, PhloemError, QueueFull
from phloem.core.messages import Abort, Draw, Painted

if TYPE_CHECKING:
    from phloem.client.counters import Counters
    from phloem.core.messages import ToEngine

_BY_STATUS = {400: BadRequest, 503: QueueFull, 507: OutOfMemory}


class Painting:
    """Async iterator over the news of one call's pictures, until all are done; the first failure ends it."""

    def __init__(self, easel: Easel, draws: list[Draw]) -> None:
        self.draws = draws
        self.background = False  # a client that leaves ends it
        self.arrival = time.monotonic()
        self.order = {draw.id: at for at, draw in enumerate(draws)}
        self.open = set(self.order)
        self._easel = easel
        self._news: deque[Painted] = deque()
        self._error: PhloemError | None = None
        self._wake = asyncio.Event()

    def __aiter__(self) -> Painting:
        return self

    async def __anext__(self) -> Painted:
        """Raises what has ended the call."""
        while True:
            if self._news:
                return self._news.popleft()
            if self._error is not None:
                raise self._error
            if not self.open:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()

    async def pictures(self) -> list[Painted]:
        """All of them, finished, in the order in which they were asked for."""
        found = {told.id: told async for told in self if told.done}
        return [found[draw.id] for draw in self.draws]

    def take(self, told: Painted) -> None:
        if told.error:
            kind = _BY_STATUS.get(told.status, PhloemError)
            self.fail(kind(told.error, param=told.param, code=told.code))
            return
        if told.done:
            self.open.discard(told.id)
        self._news.append(told)
        self._wake.set()

    def fail(self, error: PhloemError) -> None:
        """End with this error, once what has come before is read."""
        self._error = self._error or error
        self.cancel()

    def cancel(self) -> None:
        """Stop the engine's work on what is not done. Harmless when repeated."""
        self._easel.drop(self)
        if self.open:
            self._error = self._error or ClientGone("the call was ended")
            self.open.clear()
        self._wake.set()


class Easel:
    """Args: what sends to the engine (raises EngineDead), and what counts."""

    def __init__(self, send: Callable[[ToEngine], None], counters: Counters) -> None:
        self.active: dict[str, Painting] = {}
        self._send, self._counters = send, counters

    def begin(self, draws: list[Draw]) -> Painting:
        """Raises EngineDead."""
        painting = Painting(self, draws)
        self.active |= dict.fromkeys(painting.open, painting)
        try:
            for draw in draws:
                self._send(draw)
        except UnicodeEncodeError:
            painting.cancel()
            raise BadRequest("a field holds lone surrogates: it is no valid Unicode") from None
        except BaseException:
            painting.cancel()
            raise
        return painting

    def on_painted(self, told: Painted, now: float) -> None:
        painting = self.active.get(told.id)
        if painting is None:
            return  # ended meanwhile
        if told.done:
            del self.active[told.id]
            if not told.error:
                self._counters.on_picture(told, now - painting.arrival)
                self._counters.requests += 1
        painting.take(told)

    def drop(self, painting: Painting) -> None:
        for key in [key for key in painting.open if self.active.pop(key, None) is not None]:
            self._counters.aborted += 1
            with contextlib.suppress(EngineDead):
                self._send(Abort(id=key))

    def abort(self, rid: str = "", everything: bool = False) -> int:
        """End calls by the id of the call or of one of its pictures; gives how many pictures that were."""
        found = [key for key in self.active if everything or rid == key or rid == key.rsplit("-", 1)[0]]
        for painting in {id(self.active[key]): self.active[key] for key in found}.values():
            painting.fail(BadRequest("the request was aborted", code="aborted"))
        return len(found)

    def fail_all(self, error: PhloemError) -> None:
        """The engine is gone."""
        active, self.active = self.active, {}
        for painting in active.values():
            painting.fail(error)
