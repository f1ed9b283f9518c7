"""The side of a language model without towers: encoder servers are asked for what a request's pictures became.

A request waits (`core.late.Late`) until the embeddings of all its items are here; from then on they stand in the place
of the pixels, as if they had come with it. Items are asked for one by one, each from the encoder that has the fewest
tokens to make for this server; among those that have equally many the item's content decides, so that the same picture
goes to the encoder that knows it. Where one is lost, another is asked; where none is left, the request ends with 503.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import socket
import sys
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from phloem.core.errors import BadRequest, ConfigError, EngineDead, PhloemError
from phloem.disagg.embeddings import MISFIT, PATH, RAW, Look, encode, most_answered, read_made
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from phloem.core.media import Media
    from phloem.core.messages import Submit

_log = log.get("disagg")

CONNECT, ANSWER = 5.0, 300.0  # seconds: to be let in, and for an encoder to make what is before it in its queue
PAUSES = (1.0, 30.0)  # seconds for which an encoder that failed is asked last: at first, and at most
EACH, MOST_THREADS = 4, 32  # items that are asked for at a time: of each encoder, and in all
NAME = "encoder_urls"
ENDS = "this server ends"


class Lost(Exception):
    """An encoder did not answer, or cannot: another one may."""


def addresses(urls: Sequence[str]) -> list[str]:
    """URLs as they may be given: several in one text, too. Raises ConfigError."""
    found = [one.strip().rstrip("/") for text in urls for one in text.split(",") if one.strip()]
    for url in found:
        parts = urlsplit(url)
        try:
            good = parts.scheme in ("http", "https") and parts.hostname and not parts.path and parts.port != 0
        except ValueError:
            good = False
        if not good or parts.query or parts.fragment or parts.username:
            raise ConfigError(f"{NAME}: {url!r:.200} is no address such as http://10.0.0.2:30000", param=NAME)
    if not found:
        raise ConfigError(f"{NAME}: no address is given", param=NAME)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Wanted:
    """What embeddings must be. `facts`: as `engine.encoding.facts_of`; `width`: values of one."""

    facts: Mapping[str, str]
    width: int

    @property
    def kind(self) -> str:
        return self.facts["dtype"]


@dataclass(eq=False)
class Encoder:
    """One of the servers. `load`: tokens that it makes for us now."""

    url: str
    load: int = 0
    pause: float = 0.0  # how long it is asked last, since it failed; 0: it has not
    until: float = 0.0
    asked: int = 0
    failed: int = 0
    why: str = ""  # it failed


@dataclass(eq=False)
class _Job:
    """One item on its way, for whoever wants it."""

    item: Media
    made: bytes = b""
    error: PhloemError | None = None
    ended: bool = False
    wanted: list[weakref.ref[Awaited]] = field(default_factory=list["weakref.ref[Awaited]"])


class Awaited:
    """What one request waits for (`core.late.Late`). Nobody has it but the request: it is gone with it."""

    error: PhloemError | None = None

    def __init__(self, submit: Submit, kind: str) -> None:
        self._submit, self._kind = submit, kind
        self.jobs: dict[bytes, _Job] = {}

    def ready(self) -> bool:
        ended = [job for job in self.jobs.values() if job.ended]
        self.error = next((job.error for job in ended if job.error is not None), None)
        if self.error is not None:
            return True
        if len(ended) < len(self.jobs):
            return False
        found = {digest: job.made for digest, job in self.jobs.items()}
        dress(self._submit, found, self._kind)
        self.jobs = {}
        return True


def dress(submit: Submit, made: Mapping[bytes, bytes], kind: str) -> None:
    """Give a request's items their embeddings. The list is a new one: others may have the old one."""
    submit.media = [
        msgspec.structs.replace(item, features=made[item.digest], kind=kind, pixels=b"")
        if item.digest in made
        else item
        for item in submit.media
    ]


class Encoders:
    """`expect` and `state` are called in the scheduler's thread, `close` in any.

    `budget`: bytes of embeddings that are kept when no request has them any more. `ask`: for tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        wanted: Wanted,
        budget: int,
        key: str | None = None,
        ask: Callable[[str, bytes, int], bytes] | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.all = [Encoder(url) for url in addresses(urls)]
        self.wanted, self.fetched, self.found, self.nbytes, self.seconds = wanted, 0, 0, 0, 0.0
        self._ask = ask or Caller(key)
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._budget, self._held = budget, 0
        self._coming: dict[bytes, _Job] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = 0

    def expect(self, submit: Submit) -> Awaited | None:
        """Begin to ask for what a request's items became; None: all of it is at hand, and the request has it now."""
        waits, kept = Awaited(submit, self.wanted.kind), dict[bytes, bytes]()
        with self._lock:
            for item in submit.media:
                digest = item.digest
                if digest in kept or digest in waits.jobs:
                    continue
                at_hand = self._kept.get(digest)
                if at_hand is not None:
                    self._kept.move_to_end(digest)
                    kept[digest] = at_hand
                else:
                    waits.jobs[digest] = self._join(item, waits)
            self.found += len(kept)
        dress(submit, kept, self.wanted.kind)
        return waits if waits.jobs else None

    def _join(self, item: Media, waits: Awaited) -> _Job:
        """The one of this content that is on its way, or a new one. With the lock."""
        if self._closed:
            return _Job(item, error=EngineDead(ENDS), ended=True)
        job = self._coming.get(item.digest)
        if job is None:
            job = self._coming[item.digest] = _Job(item)
            self._jobs.put(job)
            most = min(MOST_THREADS, EACH * len(self.all))
            if self._threads < min(most, len(self._coming)):
                self._threads += 1
                threading.Thread(target=self._run, name="phloem-encoders", daemon=True).start()
        job.wanted.append(weakref.ref(waits))
        return job

    # the threads that ask

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            self._do(job)
            del job  # its pixels would stay until the next one comes

    def _do(self, job: _Job) -> None:
        with self._lock:
            if self._closed or all(one() is None for one in job.wanted):  # its requests have ended
                job.error = EngineDead(ENDS)
                self._end(job)
                return
        begun = self._clock()
        made, error = b"", None
        try:
            made = self._fetch(job.item)
        except PhloemError as refused:
            error = refused
        except Exception as raised:
            _log.exception("embeddings could not be fetched")
            error = EngineDead(f"{type(raised).__name__}: {raised}")
        with self._lock:
            job.made, job.error = made, error
            if error is None:
                self.fetched, self.nbytes = self.fetched + 1, self.nbytes + len(made)
                self.seconds += self._clock() - begun
                self._keep(job.item.digest, made)
            self._end(job)

    def _end(self, job: _Job) -> None:
        del self._coming[job.item.digest]
        job.ended = True

    def _keep(self, digest: bytes, made: bytes) -> None:
        self._kept[digest] = made
        self._held += len(made)
        while self._held > self._budget and self._kept:
            self._held -= len(self._kept.popitem(last=False)[1])

    def _fetch(self, item: Media) -> bytes:
        """Raises BadRequest: the item cannot be encoded. EngineDead: no encoder is left."""
        body = encode(Look(item, dict(self.wanted.facts)))
        left, reasons = list(self.all), list[str]()
        while left and not self._closed:
            with self._lock:
                one = min(left, key=lambda other: self._rank(other, item))
                one.load, one.asked = one.load + item.count, one.asked + 1
            left.remove(one)
            try:
                data = self._ask(one.url, body, most_answered(item, self.wanted.kind, self.wanted.width))
                made = read_made(data, item, self.wanted.kind, self.wanted.width)
            except (Lost, ValueError) as error:
                reasons.append(f"{one.url}: {error}")
                self._failed(one, str(error))
            else:
                self._served(one)
                return made.data
            finally:
                with self._lock:
                    one.load -= item.count
        raise EngineDead("no encoder server has answered: " + ("; ".join(reasons) or ENDS))

    def _rank(self, one: Encoder, item: Media) -> tuple[bool, int, bytes]:
        """The least is asked first: those that failed a moment ago come last."""
        draw = blake2b(item.digest + one.url.encode(), digest_size=8).digest()  # rendezvous hashing
        return one.until > self._clock(), one.load, draw

    def _failed(self, one: Encoder, why: str) -> None:
        with self._lock:
            if not one.pause:
                _log.warning("encoder server %s is asked last for a while: %s", one.url, why)
            one.pause = min(PAUSES[1], max(PAUSES[0], 2 * one.pause))
            one.until, one.failed, one.why = self._clock() + one.pause, one.failed + 1, why

    def _served(self, one: Encoder) -> None:
        with self._lock:
            if one.pause:
                _log.info("encoder server %s answers again", one.url)
            one.pause = one.until = 0.0
            one.why = ""

    def state(self) -> dict[str, Any]:
        """For people."""
        with self._lock:
            return {
                "media_fetched": self.fetched,
                "media_found": self.found,
                "media_coming": len(self._coming),
                "embedding_bytes": self.nbytes,
                "embedding_bytes_kept": self._held,
                "fetch_seconds": self.seconds,
                "encoders": [
                    {"url": one.url, "tokens": one.load, "asked": one.asked, "failed": one.failed, "why": one.why}
                    for one in self.all
                ],
            }

    def close(self) -> None:
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, 0
        for _ in range(threads):
            self._jobs.put(None)
        if isinstance(self._ask, Caller):
            self._ask.hang_up()


class Caller:
    """POST over HTTP, a connection each. `key`: sent as a bearer token."""

    def __init__(self, key: str | None = None) -> None:
        self._headers = {"content-type": RAW, **({} if key is None else {"authorization": f"Bearer {key}"})}
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()

    def __call__(self, url: str, body: bytes, most: int) -> bytes:
        """The answer's body, of at most so many bytes.

        Raises:
            BadRequest: the item cannot be encoded anywhere.
            Lost: this server does not answer, is busy, or is not the one for us.
        """
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        link = kind(parts.hostname or "", parts.port, timeout=CONNECT)
        with self._lock:
            self._open.add(link)
        try:
            link.connect()
            _watch(link.sock)
            link.request("POST", PATH, body, self._headers)
            answer = link.getresponse()
            data = answer.read(most + 1)
        except (OSError, http.client.HTTPException) as error:
            raise Lost(f"{type(error).__name__}: {error}") from None
        finally:
            with self._lock:
                self._open.discard(link)
            link.close()
        if answer.status == 200 and len(data) <= most:
            return data
        raise _refusal(answer.status, data)

    def hang_up(self) -> None:
        """Whoever waits for an answer waits no more."""
        with self._lock:
            links = list(self._open)
        for link in links:
            with contextlib.suppress(OSError, AttributeError):  # not connected yet
                link.sock.shutdown(socket.SHUT_RDWR)


def _watch(sock: socket.socket) -> None:
    """An encoder may compute for minutes; that its machine has gone is noticed in half of one."""
    sock.settimeout(ANSWER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for name, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
            sock.setsockopt(socket.IPPROTO_TCP, name, value)


def _refusal(status: int, data: bytes) -> PhloemError | Lost:
    message = f"HTTP {status}"
    with contextlib.suppress(msgspec.DecodeError, KeyError, TypeError):
        message = f"{message}: {msgspec.json.decode(data)['error']['message']!s:.500}"
    if status == 200:
        return Lost("its answer is longer than it can be")
    if status == 400:
        return BadRequest(f"an encoder server refused it: {message}", param="image_data")
    if status == 413:
        return BadRequest(f"an encoder server takes no item as large: {message}", param="image_data")
    if status in (401, 403):
        message = f"{message} (api_key is sent to encoder servers: all have the same one)"
    if status == MISFIT:
        message = f"it is not the one for this model: {message}"
    return Lost(message)
