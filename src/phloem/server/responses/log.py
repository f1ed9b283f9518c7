"""The events of a background response, kept while it is: any number of readers, each from where it wants to begin."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from phloem.core.errors import PhloemError


class EventLog:
    """Event `n` of the list has the sequence number `n`. Used in the event loop alone."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.size = 0  # bytes
        self.error: PhloemError | None = None  # that came before the first event
        self._ended = False
        self._changed = asyncio.Event()

    def add(self, data: bytes) -> None:
        """Take one or more whole events."""
        self.events += [block + b"\n\n" for block in data.split(b"\n\n") if block]
        self.size += len(data)
        self._wake()

    def end(self, error: PhloemError | None = None) -> None:
        """Nothing more will come. Harmless when repeated."""
        if not self._ended:
            self._ended, self.error = True, error
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, reader: Reader, after: int = -1) -> AsyncGenerator[bytes, None]:
        """Events behind number `after`, to the end or until the reader has gone. Raises what ended it early."""
        at = max(0, after + 1)
        while not reader.gone:
            changed = self._changed
            if at < len(self.events):
                news, at = self.events[at:], len(self.events)
                yield b"".join(news)
            elif self._ended:
                if self.error is not None:
                    raise self.error
                return
            else:
                await reader.wait(changed)


class Reader:
    """What a stream ends when its client leaves: the reading, not the response."""

    background = False

    def __init__(self) -> None:
        self.gone = False
        self._left = asyncio.Event()

    def cancel(self) -> None:
        self.gone = True
        self._left.set()

    async def wait(self, changed: asyncio.Event) -> None:
        """Until there is news or the client has gone."""
        waits = [asyncio.ensure_future(event.wait()) for event in (changed, self._left)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
