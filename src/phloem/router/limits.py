"""Who may go on, who waits, and who is told to come again: requests at once, and tokens a second of each key."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from phloem.core.errors import PhloemError

if TYPE_CHECKING:
    from phloem.router.settings import Settings

MOST_KEYS = 10_000
BURST_SECONDS = 10.0


class TooMany(PhloemError):
    """Too much is asked for at once; `after` seconds later there may be room."""

    status = 429
    kind = "rate_limit_error"
    retryable = True

    def __init__(self, message: str, after: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.after = max(1, math.ceil(after))


class WaitedTooLong(PhloemError):
    """A request's turn did not come in time."""

    status = 408
    kind = "overloaded_error"
    retryable = True


class Gate:
    """At most so many requests at once. Others wait by priority; of equals those go first whose client has fewer
    requests here already, so that one with hundreds does not keep away one with a few; then by arrival."""

    def __init__(self, settings: Settings) -> None:
        self._most = settings.max_concurrent_requests
        self._queue_size, self._patience = settings.queue_size, settings.queue_timeout_secs
        self._heap: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._held: Counter[str] = Counter()  # client -> its requests that wait or are inside
        self._sequence = 0
        self.inside = 0
        self.waiting = 0

    async def enter(self, priority: int, client: str, waits: list[asyncio.Future[None]]) -> None:
        """Raises TooMany or WaitedTooLong; else `leave` must follow.

        What is waited for is put into `waits`, for whoever wants to cancel it.
        """
        if self._most < 0 or (self.inside < self._most and not self.waiting):
            self.inside += 1
            self._held[client] += 1
            return
        if self.waiting >= self._queue_size:
            raise TooMany(f"{self.inside} requests are in flight and {self.waiting} wait", code="queue_full")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sequence += 1
        waits.append(turn)
        heapq.heappush(self._heap, (-priority, self._held[client], self._sequence, turn))
        self.waiting += 1
        self._held[client] += 1
        try:
            async with asyncio.timeout(self._patience):
                await turn
        except TimeoutError:
            if turn.done() and not turn.cancelled():
                return  # it came in the same moment
            self._forget(client)
            raise WaitedTooLong(f"no turn within {self._patience:g} s", code="queue_timeout") from None
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(client)
            else:
                self._forget(client)
            raise
        finally:
            self.waiting -= 1

    def leave(self, client: str) -> None:
        self.inside -= 1
        self._forget(client)
        while self._heap and self.inside < self._most:
            *_, turn = heapq.heappop(self._heap)
            if not turn.done():
                self.inside += 1
                turn.set_result(None)

    def _forget(self, client: str) -> None:
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]


class Buckets:
    """A bucket of tokens for each key, filled at a steady rate. Pure: the caller says what time it is."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst or rate * BURST_SECONDS
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> (tokens left, when)

    def take(self, key: str, tokens: float, now: float) -> None:
        """Raises TooMany. A full bucket pays for any request, and goes below zero for one that is larger."""
        if self._rate <= 0:
            return
        left, then = self._levels.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        needed = min(tokens, self._burst)
        fits = left >= needed
        self._levels[key] = (left - tokens if fits else left, now)
        if len(self._levels) > MOST_KEYS:
            self._levels.popitem(last=False)
        if not fits:
            raise TooMany(
                f"this key may have {self._rate:g} tokens a second, and this request is {tokens:.0f}",
                (needed - left) / self._rate,
                code="rate_limited",
            )
