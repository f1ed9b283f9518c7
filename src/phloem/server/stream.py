"""Server-sent events, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.responses import Response

from phloem.client.call import Call
from phloem.core.errors import PhloemError
from phloem.grammar.schema.numbers import as_double
from phloem.server.errors import error_body

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from phloem.client.continuation import Continuation

log = logging.getLogger("phloem.server")

DONE = b"data: [DONE]\n\n"
BODY_SEND = "phloem.body_send"  # in the scope: a `send` for what follows `http.response.start`, past the middle layers
BODY_WRITE = "phloem.body_write"  # in the scope: a `Write` to the body, where the server has one
encode = msgspec.json.Encoder(enc_hook=as_double).encode


def event(data: Any) -> bytes:
    """One event of anything msgspec encodes."""
    return b"data: " + encode(data) + b"\n\n"


class TextEvent:
    """An event of which only one text changes: encoded once around it, so that each takes the text's encoding alone.

    Args:
        make: builds the event's data with a text in its place.
    """

    def __init__(self, make: Callable[[str], Any]) -> None:
        mark = uuid.uuid4().hex
        self._before, _, self._after = event(make(mark)).partition(encode(mark))

    def __call__(self, text: str) -> bytes:
        return self._before + encode(text) + self._after


class Ends(Protocol):
    """What a stream ends when its client leaves: a call, or the reading of another one's events."""

    background: bool

    def cancel(self) -> None: ...


async def watch(receive: Receive, call: Ends) -> None:
    """For a task: cancel the call when the client hangs up, unless it goes on in the background."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not call.background:
        call.cancel()


async def collect(request: Request, call: Call) -> list[Continuation]:
    """All outputs of a call without stream, finished. Raises what the call raises."""
    watching = asyncio.create_task(watch(request.receive, call))
    try:
        async for outputs in call:
            return outputs
        return call.outputs
    finally:
        watching.cancel()
        call.cancel()


@dataclass(frozen=True)
class Ending:
    """How a protocol ends its streams: the last event after an orderly end, and those that tell of an error."""

    done: bytes
    error: Callable[[PhloemError], bytes]


def named_event(name: str, data: Any) -> bytes:
    """One event with its name."""
    return b"event: " + name.encode() + b"\ndata: " + encode(data) + b"\n\n"


OPENAI_ENDING = Ending(DONE, lambda error: b"data: " + error_body(error) + b"\n\n" + DONE)


async def stream(
    request: Request, call: Ends, events: AsyncGenerator[bytes, None], ending: Ending = OPENAI_ENDING
) -> Response:
    """Answer with a stream of events.

    Waits for the first one, so that a request which the engine refuses is answered with its status.
    """
    watching = asyncio.create_task(watch(request.receive, call))
    try:
        first = await anext(events, b"")
    except BaseException:
        watching.cancel()
        call.cancel()
        raise
    return EventStream(call, first, events, watching, ending)


class EventStream(Response):
    """Sends events as they come; an error on the way becomes the last event. Ends the call whatever happens.

    Where the server lends a `BODY_WRITE`, the events of a `Call` that need no thought go past the task that runs this
    response, straight from the engine's message to the socket (`Call.frame`).
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        call: Ends,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        watch: asyncio.Task[None],
        ending: Ending,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._ends, self._first, self._events, self._watch = call, first, events, watch
        self._call = call if isinstance(call, Call) else None
        self._ending = ending
        self._gone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # The answer has begun: what the layers on the way would do to it is done.
            body: Send = scope.get(BODY_SEND, send)
            await self._send(body, self._first)
            if self._call is not None:
                self._call.write = scope.get(BODY_WRITE)
            try:
                async for data in self._events:
                    await self._send(body, data)
                tail = self._ending.done
            except PhloemError as error:
                tail = self._ending.error(error)
            except OSError:
                return  # the socket has gone
            except Exception:
                log.exception("request %s: a stream broke", scope.get("request_id", "?"))
                hidden = PhloemError(f"internal error; request id {scope.get('request_id', '?')}")
                tail = self._ending.error(hidden)
            with contextlib.suppress(OSError):
                await self._send(body, b"")
            if not self._gone:
                await send({"type": "http.response.body", "body": tail, "more_body": False})
        finally:
            self._watch.cancel()
            self._ends.cancel()
            await self._events.aclose()

    async def _send(self, send: Send, data: bytes) -> None:
        """What the connection refused of the events that were written to it directly goes out before `data`."""
        if self._call is not None:
            data = self._call.held() + data
        if not data or self._gone:
            return
        try:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        except OSError:
            if not self._ends.background:
                raise
            self._gone = True  # what goes on is made for nobody to read
            if self._call is not None:
                self._call.write = None
