"""Bodies of requests: read whole before a route runs, within limits of size, time and sum.

Every route profits: one that takes no body, or answers before it reads, does not hang up on a client that still sends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.errors import BodyTooLarge, PhloemError, QueueFull, SlowBody
from phloem.server.errors import error_response
from phloem.utils import memory

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("phloem.server")

DISCARD_BYTES = 256 * 1024 * 1024  # of a body that is not wanted: read and dropped, so that the client reads our answer
DISCARD_SECONDS = 30.0
SLOWEST = 64 * 1024  # bytes a second: a body may take this long beyond the limit of silence
SMALL = 64 * 1024  # so much of each body counts for nothing: a usual request is not refused for others' long ones
BODY_DONE = "phloem.body_done"  # in the scope of an app that keeps bodies: called once it has let go of this one
TRIM_BYTES, TRIM_SECONDS = 4 * 1024 * 1024, 1.0  # let go of more than so much: given back to the system so soon


def header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


@dataclass(frozen=True)
class BodyLimits:
    """`each` and `together` in bytes, `silence` in seconds."""

    each: int
    together: int
    silence: float


class Budget:
    """Bytes of bodies that are being read or wait to be decoded, and memory given back after them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._freed = 0
        self._trim: asyncio.TimerHandle | None = None

    def take(self, count: int) -> None:
        """Raises QueueFull, and takes nothing, where it is too much."""
        if self.held + count > self.limit:
            raise QueueFull(
                f"bodies of other requests fill the {self.limit} bytes that max_bodies_bytes allows", code="bodies_full"
            )
        self.held += count

    def give(self, count: int) -> None:
        self.held -= count
        self._freed += count
        if self._freed > TRIM_BYTES and self._trim is None:
            self._trim = asyncio.get_running_loop().call_later(TRIM_SECONDS, self._give_back)

    def _give_back(self) -> None:
        self._freed, self._trim = 0, None
        asyncio.get_running_loop().run_in_executor(None, memory.trim)


class BodyGate:
    """Hands each request on with its whole body; answers 413, 408 or 503 for one that breaks a limit.

    Bodies of `wide_paths` have limits of their own, and do not count among the others. One counts until its app asks
    for what follows it; where the app `keeps` them, until it says so (`BODY_DONE`) or ends.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: BodyLimits,
        wide: BodyLimits | None = None,
        wide_paths: frozenset[str] = frozenset(),
        keeps: bool = False,
    ) -> None:
        self.app = app
        self.limits, self._keeps = limits, keeps
        self.budget = Budget(max(limits.together, limits.each))
        self._wide, self._wide_paths = wide or limits, wide_paths
        self._wide_budget = Budget(max(self._wide.together, self._wide.each))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            await self.app(scope, receive, send)
            return
        wide = scope["path"] in self._wide_paths
        limits = self._wide if wide else self.limits
        reading = _Reading(limits, self._wide_budget if wide else self.budget)
        whole: bytes | bytearray | None = None
        refused: PhloemError | None = None
        try:
            _check_declared(scope, limits)
            whole = await reading.run(receive)
        except PhloemError as error:
            refused = error.with_traceback(None)  # its frames hold what has been read
            refused.__context__ = None
        finally:
            if whole is None:
                reading.let_go()
        if refused is not None:
            await refuse(refused, scope, receive, send)
            return
        if whole is None:
            key = scope.get("request_id", "?")
            log.info("request %s (%s %s): the client left inside its body", key, scope["method"], scope["path"])
            return
        parts: list[bytes | bytearray] = [whole]
        del whole

        async def given() -> Message:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": False}
            if not self._keeps:
                reading.let_go()  # who asks on has decoded it
            return await receive()

        if self._keeps:
            scope[BODY_DONE] = reading.let_go

        try:
            await self.app(scope, given, send)
        finally:
            parts.clear()
            reading.let_go()


def _check_declared(scope: Scope, limits: BodyLimits) -> None:
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > limits.each:
        raise _too_large(f"of {int(declared)} bytes ", limits.each)


class _Reading:
    """One body as it arrives, with what it holds of the budget."""

    def __init__(self, limits: BodyLimits, budget: Budget) -> None:
        self._limits = limits
        self._budget = budget
        self._taken = 0

    async def run(self, receive: Receive) -> bytes | bytearray | None:
        """The whole body; None when its client has left. Raises BodyTooLarge, SlowBody or QueueFull."""
        limits, loop = self._limits, asyncio.get_running_loop()
        begun = loop.time()
        whole: bytes | bytearray = b""
        try:
            async with asyncio.timeout_at(begun + limits.silence) as patience:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    data: bytes = message.get("body", b"")
                    size = len(whole) + len(data)
                    if size > limits.each:
                        raise _too_large("", limits.each)
                    self._claim(size)
                    whole = _joined(whole, data)
                    if not message.get("more_body", False):
                        return whole
                    last = begun + limits.silence + size / SLOWEST
                    patience.reschedule(min(loop.time() + limits.silence, last))
        except TimeoutError:
            got = f"{len(whole)} bytes had come in {loop.time() - begun:.0f} s"
            raise SlowBody(f"the body came too slowly: {got}", code="body_timeout") from None

    def _claim(self, size: int) -> None:
        more = max(size - SMALL, 0) - self._taken
        if more > 0:
            self._budget.take(more)
            self._taken += more

    def let_go(self) -> None:
        """Harmless when repeated."""
        if self._taken:
            self._budget.give(self._taken)
            self._taken = 0


def _joined(whole: bytes | bytearray, data: bytes) -> bytes | bytearray:
    if not whole:
        return data
    if isinstance(whole, bytes):
        whole = bytearray(whole)
    whole += data
    return whole


def _too_large(size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"a body {size}is over the limit of {limit} bytes", code="body_too_large")


def has_body(scope: Scope) -> bool:
    return any(
        (key == b"content-length" and value != b"0") or key == b"transfer-encoding" for key, value in scope["headers"]
    )


async def refuse(error: PhloemError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without the body, once what the client still sends has been read and dropped."""
    waits = (header(scope, b"expect") or b"").lower() == b"100-continue"
    if has_body(scope) and not waits and not isinstance(error, SlowBody):
        await _discard(receive)
    await error_response(error, scope)(scope, receive, send)


async def _discard(receive: Receive) -> None:
    seen, deadline = 0, time.monotonic() + DISCARD_SECONDS
    while seen < DISCARD_BYTES and (left := deadline - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(left):
                message = await receive()
        except TimeoutError:
            return
        seen += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
