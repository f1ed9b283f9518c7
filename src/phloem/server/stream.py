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
from phloem.server.errors import error_body

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from phloem.client.request import Output

log = logging.getLogger("phloem.server")

DONE = b"data: [DONE]\n\n"
BODY_SEND = "phloem.body_send"  # in the scope: a `send` for what follows `http.response.start`, past the middle layers
BODY_WRITE = "phloem.body_write"  # in the scope: a `BodyWrite`, where the server has one
BodyWrite = Callable[[bytes], bool]  # writes a part of the body at once; False: it cannot now, `send` must
encode = msgspec.json.Encoder().encode


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


async def _watch(receive: Receive, call: Ends) -> None:
    """Cancel the call when the client hangs up, unless it goes on in the background."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not call.background:
        call.cancel()


async def collect(request: Request, call: Call) -> list[Output]:
    """All outputs of a call without stream, finished. Raises what the call raises."""
    watch = asyncio.create_task(_watch(request.receive, call))
    try:
        async for outputs in call:
            return outputs
        return call.outputs
    finally:
        watch.cancel()
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
    watch = asyncio.create_task(_watch(request.receive, call))
    try:
        first = await anext(events, b"")
    except BaseException:
        watch.cancel()
        call.cancel()
        raise
    return EventStream(call, first, events, watch, ending)


class EventStream(Response):
    """Sends events as they come; an error on the way becomes the last event. Ends the call whatever happens.

    Where the server lends a `BODY_WRITE`, the events of a `Call` that need no thought go past the task that runs this
    response, straight from the engine's message to the socket (`_pass`).
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
        self._call, self._first, self._events, self._watch = call, first, events, watch
        self._ending = ending
        self._gone = False
        self._body: Send | None = None
        self._write: BodyWrite | None = None
        self._stuck: asyncio.Task[None] | None = None  # sends what waits for a client that reads too slowly:
        self._behind: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # The answer has begun: what the layers on the way would do to it is done.
            body = self._body = scope.get(BODY_SEND, send)
            await self._send(body, self._first)
            self._write = scope.get(BODY_WRITE)
            self._pass_on(True)
            try:
                async for data in self._events:
                    await self._unstick()
                    await self._send(body, data)
                await self._unstick()
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
                await self._unstick()
            if not self._gone:
                await send({"type": "http.response.body", "body": tail, "more_body": False})
        finally:
            self._watch.cancel()
            self._pass_on(False)
            if self._stuck is not None:
                self._stuck.cancel()
            self._call.cancel()
            await self._events.aclose()

    async def _send(self, send: Send, data: bytes) -> None:
        if not self._gone:
            try:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            except OSError:
                if not self._call.background:
                    raise
                self._gone = True  # what goes on is made for nobody to read

    def _pass_on(self, directly: bool) -> None:
        if isinstance(self._call, Call):
            self._call.pass_to(self._pass if directly and self._write is not None else None)

    def _pass(self, data: bytes) -> None:
        """Write an event while the response's task sleeps. When the client reads too slowly, this and what follows wait
        for it in a task, and news go to the reader again."""
        assert self._write is not None
        if self._stuck is None and self._write(data):
            return
        self._behind.append(data)
        if self._stuck is None:
            self._pass_on(False)
            self._stuck = asyncio.ensure_future(self._send_behind())

    async def _send_behind(self) -> None:
        assert self._body is not None
        while self._behind:
            await self._send(self._body, self._behind.pop(0))

    async def _unstick(self) -> None:
        """What waits for the client goes out before anything else does."""
        if self._stuck is not None:
            await self._stuck
            self._stuck = None
            self._pass_on(True)
