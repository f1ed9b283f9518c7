"""Prompts to prefill servers and answers from decode servers: one request, sent to both of a pair.

Both get the same body, with the address of prefill's bootstrap server and a room that only they share. The client is
answered by decode; prefill's answer of one token is read and dropped. Where prefill refuses, another pair is tried;
where it goes away, decode notices by itself and computes the prompt; where none is well, decode is told so at once.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.client.request import FAKE_HOST
from phloem.core.errors import BadRequest
from phloem.router.policies._base import Chosen
from phloem.router.upstream import Exchange, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.router.ask import Ask
    from phloem.router.policies._base import Policy
    from phloem.router.worker import Load, Worker

PREFILL, DECODE, REGULAR = "prefill", "decode", "regular"
ROLES = (REGULAR, PREFILL, DECODE)
PAIRED = frozenset(("/v1/chat/completions", "/v1/completions", "/generate", "/v1/messages"))
ALONE = frozenset(("/v1/responses",))  # decode computes the prompt too: what a response goes on from is kept there
REFUSALS = frozenset((408, 429, 500, 502, 503, 504))
WHOLE = b"x-phloem-pair"  # to decode: answer with what prefill knows too, nobody puts the two together
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def choose(ask: Ask, policy: Policy, ready: Sequence[Worker], tried: Sequence[Worker]) -> Chosen:
    """A decode server with the least work, and a prefill server by the policy. `ready`: at least one decode server."""
    decodes = [worker for worker in ready if worker.role == DECODE]
    decode = policy.least([worker for worker in decodes if worker not in tried] or decodes)
    fresh = [worker for worker in ready if worker.role == PREFILL and worker not in tried]
    if not fresh:
        return Chosen(decode, "no prefill server is well: it computes the prompt too")
    found = policy.choose(ask, fresh)
    return Chosen(decode, f"least work; prompt to {found.worker.url}: {found.why}", 0.0, found.worker, found.cached)


def with_room(body: bytes | bytearray, prefill: Worker | None) -> bytes | bytearray:
    """The body for both of a pair; without prefill, for decode alone. What is no JSON object is left as it is."""
    try:
        fields = _fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body
    count = _prompts(fields)
    if any(bytes(fields.get(name, b"null")) != b"null" for name in ("bootstrap_room", "bootstrap_host")):
        raise BadRequest("bootstrap_room: the gateway chooses it", param="bootstrap_room")
    host = FAKE_HOST if prefill is None else prefill.host
    port = None if prefill is None else prefill.bootstrap_port
    rooms: Any = [secrets.randbits(63) for _ in range(count)]
    told = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": rooms if count > 1 else rooms[0]}
    if _listed(fields):
        told = {name: value if isinstance(value, list) else [value] * count for name, value in told.items()}
    fields |= {name: msgspec.Raw(_encode(value)) for name, value in told.items()}
    return _encode(fields)


def _listed(fields: dict[str, msgspec.Raw]) -> bool:
    return _prompts(fields) > 1


def _prompts(fields: dict[str, msgspec.Raw]) -> int:
    """Of a batch: a list of texts, or of lists of ids."""
    for name in ("prompt", "text", "input_ids"):
        part = bytes(fields.get(name, b"null"))
        if part[:1] == b"[":
            try:
                items = _items(part)
            except (msgspec.DecodeError, RecursionError):
                return 1
            return len(items) if items and bytes(items[0])[:1] in (b'"', b"[") else 1
    return 1


@dataclass(eq=False)
class Side:
    """The half of a request that goes to prefill. `refused`: its status, where it would not."""

    worker: Worker
    exchange: Exchange
    load: Load
    task: asyncio.Task[None] | None = None
    refused: int = 0
    error: UpstreamError | None = None

    def begin(self, head: bytes, body: bytes | bytearray, answered: Exchange, broke: Callable[[Side], None]) -> None:
        """`answered`: decode's, which waits in vain where prefill refuses."""
        self.task = asyncio.get_running_loop().create_task(self._run(head, body, answered, broke))

    async def _run(
        self, head: bytes, body: bytes | bytearray, answered: Exchange, broke: Callable[[Side], None]
    ) -> None:
        self.worker.breaker.begun(self.exchange.began)
        try:
            await self.worker.pool.send(self.exchange, head, body)
            status = await self.exchange.head()
            self.load.first()
            if status in REFUSALS:
                self.refused = status
                broke(self)
                answered.cancel(f"{self.worker.url} answered {status}")
                return
            self.worker.breaker.answered()
            while await self.exchange.read():
                pass
            self.worker.breaker.succeeded()
        except UpstreamError as error:
            self.error = error
            broke(self)
        finally:
            self.worker.breaker.let_go()
            self.load.end()
            self.exchange.cancel()

    def end(self) -> None:
        """Nobody waits for it any more."""
        if self.task is not None:
            self.task.cancel()
