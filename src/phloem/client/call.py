"""One call: what `EngineClient.submit` gives, to be read and ended. Client and continuations do not know it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from phloem.client.consumers import Direct
from phloem.core.errors import PhloemError

if TYPE_CHECKING:
    from phloem.client.consumers import Reader
    from phloem.client.continuation import Continuation, Frame, Write
    from phloem.client.flow import Flow


class ClientGone(PhloemError):
    """The client has hung up: nobody reads this answer."""

    status = 499
    kind = "client_disconnected"


class Call:
    """Async iterator over the news of a call's continuations (see `GenerateRequest.stream`).

    `frame` and `write`, once both are set, make the events between a lone continuation's first and its last, past the
    reader: while it sleeps, and only when it has nothing left to tell. An iteration may then bring no outputs: there
    are events in `held()` that the connection refused.
    """

    def __init__(self, flow: Flow, outputs: list[Continuation], reader: Reader, background: bool = False) -> None:
        self.outputs = outputs
        self.background = background  # a client that leaves does not end it
        self.frame: Frame | None = None
        self.write: Write | None = None
        self._flow = flow
        self._reader = reader

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> list[Continuation]:
        reader = self._reader
        while True:
            if reader.news_of:
                news = reader.take_news()
                return news if reader.stream else self.outputs
            if reader.held:
                return []
            if reader.error is not None and reader.open:
                raise reader.error
            if not reader.open:
                raise StopAsyncIteration
            await self._sleep()

    async def _sleep(self) -> None:
        """Until there is news for the reader; meanwhile the continuation may have another consumer."""
        try:
            if self.frame is not None and self.write is not None and len(self.outputs) == 1:
                (output,) = self.outputs
                follow = output.decoder.follow if output.decoder is not None else None
                plain = follow if output.item.stream_interval == 1 else None
                output.consumer = Direct(self._reader, plain, self.frame, self.write)
            await self._reader.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            if len(self.outputs) == 1:
                self.outputs[0].consumer = self._reader

    def held(self) -> bytes:
        """The events that a connection refused: they come before what is written next."""
        reader = self._reader
        data = b"".join(reader.held)
        reader.held.clear()
        return data

    def fail(self, error: PhloemError) -> None:
        """End the reading with this error, behind what has already arrived."""
        self._reader.fail(error)

    def cancel(self) -> None:
        """Abort what still runs: the client has gone, or the reader has had enough. Harmless when repeated."""
        self._flow.drop_all(self.outputs)
        self._reader.news_of.clear()
        if self._reader.open:
            self.fail(ClientGone("the client has disconnected"))
