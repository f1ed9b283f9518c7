"""One server as the gateway knows it: where it is, how it is, and what it has been given to do.

Work is counted in predicted tokens, not in requests: one prompt of 100,000 tokens is worth a thousand short ones. Every
request is a `Load`, which is taken off again however the request ends.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phloem.router.address import parse_url
from phloem.router.breaker import Breaker
from phloem.router.upstream import Pool

if TYPE_CHECKING:
    from phloem.router.settings import Settings

DECODE_COST = 2.0  # what one token of an answer weighs, in tokens of a prompt: it takes a step, but of a whole batch
DEFAULT_RATE = 4000.0  # prompt tokens a second, until the server's own counters tell
SLOWEST_RATE = 10.0


def _number(told: Any) -> float:
    """What a server of another make may leave out, or spell otherwise, counts for nothing."""
    return told if isinstance(told, int | float) else 0


@dataclass(slots=True)
class Load:
    """What one request puts on one server, in tokens."""

    worker: Worker
    prompt: float  # not cached there
    output: float
    cached: float = 0.0
    began: bool = False  # its first byte has come
    ended: bool = False

    def first(self) -> None:
        """The prompt has been computed."""
        if not self.began and not self.ended:
            self.began = True
            self.worker.pending -= self.prompt

    def end(self) -> None:
        """Harmless when repeated."""
        if self.ended:
            return
        self.first()
        self.ended = True
        self.worker.running -= 1
        self.worker.decoding -= self.output


@dataclass(eq=False)
class Worker:
    """`bit` is its place in sets of workers; `facts` what it said of itself."""

    url: str
    host: str
    port: int
    settings: Settings
    bit: int
    pool: Pool
    breaker: Breaker
    given_models: tuple[str, ...] = ()  # by whoever added it; else it is asked
    models: tuple[str, ...] = ()
    healthy: bool = False
    draining: bool = False
    why: str = "not asked yet"
    fails: int = 0
    passes: int = 0
    breaks: int = 0  # how often a request found it not even listening
    running: int = 0
    pending: float = 0.0  # prompt tokens that are sent and not answered yet
    decoding: float = 0.0  # tokens of answers to come
    rate: float = DEFAULT_RATE
    requests: int = 0
    errors: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    role: str = "regular"  # or prefill, or decode: of pairs
    bootstrap_port: int = 0  # of a prefill server
    labels: dict[str, Any] = field(default_factory=dict)
    settle: asyncio.Event = field(default_factory=asyncio.Event)  # set: look at it now
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # set: it has been looked at, well or not

    @staticmethod
    def at(url: str, settings: Settings, bit: int) -> Worker:
        """Raises BadRequest: the address is none."""
        text, host, port = parse_url(url)
        pool = Pool(host, port, settings.connect_timeout)
        return Worker(text, host, port, settings, bit, pool, Breaker(settings))

    @property
    def id(self) -> str:
        """The same for the same address, also after a restart of the gateway."""
        return hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()

    def serves(self, now: float) -> bool:
        return self.healthy and not self.draining and self.breaker.allows(now)

    # load

    def take(self, prompt: float, output: float, cached: float) -> Load:
        """A request goes there, of whose prompt so many tokens are cached."""
        load = Load(self, max(prompt - cached, 0.0), output * DECODE_COST, cached)
        self.running += 1
        self.requests += 1
        self.pending += load.prompt
        self.decoding += load.output
        return load

    @property
    def work(self) -> float:
        """Tokens that it has still to compute, of our requests."""
        return self.pending + self.decoding

    def seconds(self, more: float = 0.0) -> float:
        """How long its work and `more` prompt tokens would take it."""
        return (self.pending + self.decoding + more) / self.rate

    def wait(self, more: float) -> float:
        """Seconds until a prompt that leaves `more` tokens to compute has its first token."""
        return (self.pending + more) / self.rate

    def learn(self, load: dict[str, Any]) -> None:
        """From `/v1/loads`: how fast it computes prompts."""
        old, self.load = self.load, load
        names = ("total_prefill_uncached_tokens", "total_prefill_busy_us")
        tokens, micros = (_number(load.get(name)) - _number(old.get(name)) for name in names)
        if tokens >= 256 and micros > 0:
            self.rate = max(SLOWEST_RATE, 0.5 * self.rate + 0.5 * tokens / micros * 1e6)

    def told(self, now: float) -> dict[str, Any]:
        """For the routes that list workers."""
        return {
            "id": self.id,
            "url": self.url,
            "model_id": self.models[0] if self.models else "unknown",
            "models": list(self.models),
            "worker_type": self.role,
            **({"bootstrap_port": self.bootstrap_port} if self.role == "prefill" else {}),
            "connection_mode": "http",
            "priority": self.priority,
            "labels": self.labels,
            "is_healthy": self.healthy,
            "draining": self.draining,
            "status": "draining" if self.draining else "ready" if self.healthy else "not_ready",
            "reason": "" if self.healthy else self.why,
            "circuit": self.breaker.state(now),
            "load": self.running,
            "pending_tokens": round(self.pending),
            "decode_tokens": round(self.decoding),
            "prefill_tokens_per_second": round(self.rate),
            "requests": self.requests,
            "errors": self.errors,
            "kv_events": self.facts.get("kv_events"),
        }
