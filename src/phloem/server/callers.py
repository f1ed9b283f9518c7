"""Who asks, and how soon an answer is to come, as the head of a request says it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from phloem.client.request import CALLER, Caller
from phloem.core.errors import BadRequest
from phloem.core.targets import in_range
from phloem.server.bodies import refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

TTFT, ITL = b"x-slo-ttft-ms", b"x-slo-itl-ms"
CLIENT = b"x-client-key"  # a gateway's word for which key its client sent
KEYS = (CLIENT, b"x-api-key", b"authorization")
_KNOWN = frozenset((TTFT, ITL, *KEYS))


class Callers:
    """ASGI: the `Caller` of each request. `keys`: whether clients are told apart by their keys."""

    def __init__(self, app: ASGIApp, keys: bool) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = {name: value for name, value in scope["headers"] if name in _KNOWN} if scope["type"] == "http" else {}
        if not said:
            await self.app(scope, receive, send)
            return
        try:
            caller = Caller(_digest(said) if self.keys else "", _seconds(said, TTFT), _seconds(said, ITL))
        except BadRequest as error:
            await refuse(error, scope, receive, send)
            return
        before = CALLER.set(caller)
        try:
            await self.app(scope, receive, send)
        finally:
            CALLER.reset(before)


def _digest(said: dict[bytes, bytes]) -> str:
    """Of the key; the key itself goes no further than this."""
    key = next((said[name] for name in KEYS if said.get(name)), b"")
    return hashlib.sha256(key).hexdigest()[:16] if key else ""


def _seconds(said: dict[bytes, bytes], name: bytes) -> float:
    """0: nothing is said. Raises BadRequest."""
    if name not in said:
        return 0.0
    text = said[name].decode("latin-1")
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not in_range(found):
        shown = name.decode()
        raise BadRequest(f"{shown}: {text[:40]!r} is not above 0 ms and at most a day", param=shown)
    return found / 1000
