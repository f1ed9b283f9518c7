"""Pure ASGI: request ids, the last resort for exceptions, HEAD, the API key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from typing import TYPE_CHECKING

from phloem.client.request import new_id
from phloem.core.errors import PhloemError, Unauthorized
from phloem.server import page
from phloem.server.bodies import header, refuse
from phloem.server.errors import error_response
from phloem.server.stream import BODY_SEND, BODY_WRITE

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("phloem.server")

OPEN_PATHS = page.PATHS | {"/health", "/ready", "/ping"}  # the latter are asked by supervisors that hold no key
_MAX_REQUEST_ID = 128
_PLAIN = re.compile(rb"[A-Za-z0-9._:-]+")


class RequestIds:
    """Outermost: gives each request an id (the client's own `x-request-id`, or a new one) and answers what no handler
    caught with 500, that id and a log line."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        key = given if given is not None and _plain(given) else new_id().encode()
        scope["request_id"] = key.decode()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", key)]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s (%s %s) failed", key.decode(), scope["method"], scope["path"])
            if not started:
                error = PhloemError(f"internal error; request id {key.decode()}")
                await error_response(error, scope)(scope, receive, send_with_id)


def _plain(value: bytes) -> bool:
    return 0 < len(value) <= _MAX_REQUEST_ID and _PLAIN.fullmatch(value) is not None


class Head:
    """HEAD answers as GET does, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # What streams must not go past `send` either.
        past = {name: value for name, value in scope.items() if name not in (BODY_SEND, BODY_WRITE)}
        await self.app({**past, "method": "GET"}, receive, without_body)


class ApiKey:
    """Bearer token or `x-api-key`, in constant time, on everything but health checks and the page's own files."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._digest = hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
            bearer = token.strip() if scheme.lower() == b"bearer" else b""
            given = hashlib.sha256(bearer or header(scope, b"x-api-key") or b"").digest()
            if not hmac.compare_digest(given, self._digest):
                error = Unauthorized("the API key is missing or wrong: send Authorization: Bearer <key>")
                await refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)
