"""Who gets a continuation's news: a reader that is woken, or a connection that is written to at once.

A continuation has one consumer; `Call` changes it, in one place, when its reader goes to sleep and when it wakes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from phloem.client.continuation import Consumer

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation, Follow, Frame, Write
    from phloem.core.errors import PhloemError


class Reader(Consumer):
    """A queue of what has news, for a task that reads. One serves all continuations of a call.

    Args:
        count: of the continuations.
        stream: False: the task wants nothing before all have ended.
    """

    __slots__ = ("_waiter", "error", "follow", "held", "news_of", "open", "stream")

    def __init__(self, count: int, stream: bool) -> None:
        self.follow = None
        self.open = count  # continuations that have not ended
        self.stream = stream
        self.error: PhloemError | None = None
        self.news_of: dict[Continuation, None] = {}
        self.held: list[bytes] = []  # events that a connection refused: they come before all others
        self._waiter: asyncio.Future[None] | None = None

    def news(self, continuation: Continuation) -> None:
        if continuation.finish is not None:
            self.open -= 1
            if not self.stream and self.open:
                return
        elif not self.stream or waits_for_more(continuation):
            return
        self.news_of[continuation] = None
        self.wake()

    def fail(self, error: PhloemError) -> None:
        if self.error is None:
            self.error = error
            self.wake()

    def hold(self, data: bytes) -> None:
        self.held.append(data)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take_news(self) -> list[Continuation]:
        """What has news since the last time, read."""
        found = list(self.news_of)
        self.news_of.clear()
        for continuation in found:
            continuation.read()
        return found

    async def wait(self) -> None:
        """Until somebody wakes it."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class Direct(Consumer):
    """Writes events straight to a connection, past the task that reads. What it cannot do goes to that task's `Reader`:
    the end, errors, and what the connection refuses."""

    __slots__ = ("follow", "frame", "reader", "write")

    def __init__(self, reader: Reader, follow: Follow | None, frame: Frame, write: Write) -> None:
        self.follow, self.frame, self.write, self.reader = follow, frame, write, reader

    def news(self, continuation: Continuation) -> None:
        if continuation.finish is not None:
            self.reader.news(continuation)
            return
        if waits_for_more(continuation):
            return
        data = self.frame(continuation, continuation.read())
        if data and not self.write(data):
            self.hold(data)

    def fail(self, error: PhloemError) -> None:
        self.reader.fail(error)

    def hold(self, data: bytes) -> None:
        """The reader's task must wait for the connection; until it wakes, everything lines up behind this."""
        self.write = _refuse
        self.reader.hold(data)


def _refuse(data: bytes) -> bool:
    return False


def waits_for_more(continuation: Continuation) -> bool:
    """Whether too few tokens have come to tell of, behind the first."""
    interval = continuation.item.stream_interval
    return interval > 1 and continuation.new_from > 0 and continuation.unread_tokens < interval
