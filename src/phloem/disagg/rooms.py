"""The prefill side: rooms, whose pages are offered as they are computed.

A *room* is one prompt that decode will fetch: by its number in the request, and which of `n` continuations it is. The
scheduler's thread opens it (`accept`), offers what each committed chunk has computed (`computed`) and closes it with
the first token (`finished`) or without (`failed`). A thread for each connection answers the decode server.

Pages that are offered are locked in the prefix tree (`CacheManager.hold_prefix`), so that they may be copied while
others are computed. A lock ends, in the scheduler's thread (`turn`), when decode has everything, has gone, or has not
come for `KEEP` seconds after the first token. Where the whole cache was emptied meanwhile the lock has gone, which is
looked at behind each copy.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest
from phloem.disagg.wire import (
    VERSION,
    Alive,
    Ask,
    Done,
    Got,
    Link,
    LinkLost,
    Pages,
    Refused,
    differing,
    digest_of,
    left,
)
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.disagg.transports import Row, Sender, Transport
    from phloem.kvcache.lease import Hold
    from phloem.kvcache.manager import CacheManager

_log = log.get("disagg")

MEET = 30.0  # seconds that whoever is first waits for the other
KEEP = 30.0  # seconds that pages are kept for a decode server that does not come
TALK = 2.0  # seconds that a peer may take for what costs it nothing
BEAT = 0.5  # seconds between two signs of life
PART = 32  # pages that are copied and told of at once
MOST_OVER = 4096  # rooms that are remembered as over
MOST_LINKS = 4096  # connections
MOST_NEW = 256  # of these, that have not said yet what they want

NO_PAGES = np.empty(0, np.int32)


@dataclass(eq=False)
class Room:
    """`pages`: those offered. `over`: nobody will fetch anything more."""

    key: str
    request_id: str
    digest: bytes
    weights: str
    pages: NDArray[np.int32] = field(default_factory=lambda: NO_PAGES)
    hold: Hold | None = None
    done: Done | None = None
    why: str = ""  # it failed
    served: bool = False  # a connection has it
    over: bool = False
    until: float = float("inf")  # the end of its locks, while nobody comes


@dataclass
class Counts:
    """Since the start."""

    fetched: int = 0  # rooms that were fetched to their end
    lost: int = 0  # that nobody came for, or whose peer went away
    refused: int = 0
    pages: int = 0
    nbytes: int = 0
    seconds: float = 0.0  # of copies and sends


@dataclass(frozen=True)
class Source:
    """What is offered. `copy`: pages of the pool to rows, from any thread. `weights`: the version of those that
    compute, as both servers know it. `facts`: what pages depend on, which decode must have alike."""

    copy: Callable[[NDArray[np.int32], Sequence[Row]], None]
    row_bytes: int
    facts: dict[str, str]
    weights: Callable[[], str]


class Rooms:
    """Of one prefill server. `waits`: how long those who are early wait, and pages are kept."""

    def __init__(
        self,
        cache: CacheManager,
        source: Source,
        transports: Sequence[Transport],
        host: str,
        *,
        meet: float = MEET,
        keep: float = KEEP,
    ) -> None:
        self.counts = Counts()
        self._cache, self._source, self._meet_seconds, self._keep = cache, source, meet, keep
        self._size = cache.page_size
        self._news = threading.Condition()
        self._rooms: dict[str, Room] = {}
        self._of: dict[str, Room] = {}  # by request
        self._over: OrderedDict[str, str] = OrderedDict()  # how rooms ended
        self._closed = False
        self._links = self._new = 0
        self.addresses: dict[str, str] = {}
        self._sockets: list[socket.socket] = []
        for transport in transports:
            sock, self.addresses[transport.name] = transport.listen(host)
            self._sockets.append(sock)
            self._thread(self._accept_all, sock, transport)

    def _thread(self, work: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=work, args=args, name="phloem-room", daemon=True).start()

    # the scheduler's thread

    @property
    def busy(self) -> bool:
        """Whether there are locks that `turn` will have to end."""
        return bool(self._rooms)

    @property
    def weights(self) -> str:
        return self._source.weights()

    def accept(self, request_id: str, key: str, prompt: NDArray[np.int32], adapter: str = "") -> None:
        """Open a room for a request. `adapter`: as `wire.digest_of`. Raises BadRequest: it is another one's."""
        with self._news:
            if key in self._rooms:
                raise BadRequest(f"bootstrap_room {key.partition('/')[0]} is in use", param="bootstrap_room")
            self._over.pop(key, None)
            room = Room(key, request_id, digest_of(prompt, adapter), self._source.weights())
            self._rooms[key] = self._of[request_id] = room
            self._news.notify_all()

    def computed(self, request_id: str, namespace: str, known: NDArray[np.int32], tokens: int) -> None:
        """A step is committed with which so many tokens have been computed: their whole pages are offered."""
        room, count = self._of.get(request_id), tokens // self._size
        if room is None or room.over or room.why or count <= len(room.pages):
            return
        if room.hold is not None and room.hold not in self._cache.holds:
            with self._news:
                room.why = "the cache was emptied"
                self._news.notify_all()
            return
        hold, pages = self._cache.hold_prefix(namespace, known, count)
        with self._news:
            before, room.hold, room.pages = room.hold, hold, pages.copy()
            self._news.notify_all()
        self._drop(before)

    def finished(self, request_id: str, done: Done) -> None:
        room = self._of.pop(request_id, None)
        if room is None:
            return
        with self._news:
            if room.weights != self._source.weights():
                room.why = "the weights were changed"
            room.done, room.until = done, monotonic() + self._keep
            self._news.notify_all()

    def failed(self, request_id: str, why: str) -> None:
        """Its request ended without a first token."""
        room = self._of.pop(request_id, None)
        if room is not None:
            with self._news:
                room.why = room.why or why
                self._news.notify_all()

    def turn(self) -> None:
        """Once a turn of the loop: locks of rooms that are over go."""
        if not self._rooms:
            return
        now = monotonic()
        ended: list[Room] = []
        with self._news:
            for room in self._rooms.values():
                if room.served:
                    continue  # a copy may be under way
                if room.over or room.why or now >= room.until:
                    ended.append(room)
            for room in ended:
                if not room.over:
                    room.over, self.counts.lost = True, self.counts.lost + 1
                    room.why = room.why or f"it was not fetched within {self._keep:g} s"
                    _log.info("room %s is over: %s", room.key, room.why)
                del self._rooms[room.key]
                self._over[room.key] = room.why or "it has been fetched"
            while len(self._over) > MOST_OVER:
                self._over.popitem(last=False)
        for room in ended:
            self._drop(room.hold)

    def _drop(self, hold: Hold | None) -> None:
        if hold is not None and hold in self._cache.holds:
            self._cache.drop(hold)

    def state(self) -> dict[str, Any]:
        """For people, and for gateways."""
        with self._news:
            rooms = list(self._rooms.values())
        counts = self.counts
        return {
            "prefill_bootstrap_queue_reqs": sum(not room.served for room in rooms),
            "prefill_inflight_queue_reqs": sum(room.done is not None for room in rooms),
            "rooms_fetched": counts.fetched,
            "rooms_lost": counts.lost,
            "rooms_refused": counts.refused,
            "kv_transfer_pages": counts.pages,
            "kv_transfer_bytes": counts.nbytes,
            "kv_transfer_speed_gb_s": counts.nbytes / counts.seconds / 1e9 if counts.seconds else 0.0,
        }

    def close(self) -> None:
        self._closed = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # closing alone wakes no thread that accepts
            sock.close()
        with self._news:
            for room in self._rooms.values():
                room.why = room.why or "the server ends"
            self._news.notify_all()

    # threads of connections

    def _accept_all(self, sock: socket.socket, transport: Transport) -> None:
        while not self._closed:
            try:
                found, _ = sock.accept()
            except OSError as error:
                if self._closed:
                    return
                _log.warning("a connection was not taken: %s", error)
                threading.Event().wait(1.0)
                continue
            link = Link(found)
            with self._news:
                full = self._links >= MOST_LINKS or self._new >= MOST_NEW
                if not full:
                    self._links, self._new = self._links + 1, self._new + 1
            if full:
                link.close()
                continue
            try:
                self._thread(self._serve, link, transport)
            except RuntimeError as error:  # no more threads
                _log.warning("a connection was not taken: %s", error)
                link.close()
                with self._news:
                    self._links, self._new = self._links - 1, self._new - 1

    def _asked(self, link: Link) -> Ask | None:
        """What a new connection wants; None: nothing that there is."""
        try:
            found = link.receive_first(TALK)
        finally:
            with self._news:
                self._new -= 1
        return found if isinstance(found, Ask) else None

    def _serve(self, link: Link, transport: Transport) -> None:
        room: Room | None = None
        try:
            ask = self._asked(link)
            if ask is None:
                return
            why = self._misfit(ask)
            if why:
                self._refuse(link, why)
                return
            sender = transport.sender(link, self._source.row_bytes, ask.end - ask.start, TALK)
            try:
                room = self._meet(link, ask)
                if room is not None:
                    self._pass(link, ask, room, sender)
            finally:
                sender.close()
        except LinkLost as error:
            if room is not None:
                self.counts.lost += 1
                _log.info("room %s: the decode server has gone: %s", room.key, error)
        except Exception:
            _log.exception("a decode server was not answered")
        finally:
            link.close()
            with self._news:
                self._links -= 1
                if room is not None:
                    room.served, room.over = False, True

    def _misfit(self, ask: Ask) -> str:
        """Why these pages are of no use to who asks; "": they are."""
        if ask.version != VERSION:
            return f"it speaks version {ask.version} of this protocol, not {VERSION}"
        why = differing({**self._source.facts, "weight_version": self._source.weights()}, ask.facts)
        if not why and not 0 <= ask.start <= ask.end <= self._cache.total_pages:
            why = f"pages {ask.start} to {ask.end} cannot be had"
        return why

    def _refuse(self, link: Link, why: str) -> None:
        self.counts.refused += 1
        link.send(Refused(why), TALK)

    def _meet(self, link: Link, ask: Ask) -> Room | None:
        """The room, which is then this connection's; None: it was refused."""
        until = monotonic() + self._meet_seconds
        while True:
            with self._news:
                room, why = self._rooms.get(ask.room), ""
                if room is not None:
                    why = "its prompt or its adapter is another" if room.digest != ask.digest else ""
                    why = "it is being fetched already" if room.served or room.over else why
                    if not why:
                        room.served = True
                        return room
                elif ask.room in self._over:
                    why = self._over[ask.room]
                elif self._closed or monotonic() >= until:
                    why = f"no request came for it within {self._meet_seconds:g} s"
                else:
                    self._news.wait(min(BEAT, left(until)))
            if why:
                self._refuse(link, f"room {ask.room}: {why}")
                return None
            self._say_alive(link)

    def _say_alive(self, link: Link) -> None:
        if link.gone():
            raise LinkLost("the peer has closed the connection")
        link.send(Alive(), TALK)

    def _pass(self, link: Link, ask: Ask, room: Room, sender: Sender) -> None:
        """Pages as they are computed, then the first token."""
        at = ask.start
        while True:
            with self._news:
                if not self._has_news(room, at):
                    self._news.wait(BEAT)
                pages, done, why = room.pages, room.done, room.why
            if why:
                self._refuse(link, f"room {room.key}: {why}")
                return
            count = min(PART, min(len(pages), ask.end) - at)
            if count > 0:
                if not self._send(link, sender, pages[at : at + count], room, at, ask.start):
                    self._refuse(link, f"room {room.key}: the cache was emptied")
                    return
                at += count
            elif done is not None:
                link.send(done, TALK)
                if isinstance(link.receive(TALK), Got):
                    self.counts.fetched += 1
                return
            else:
                self._say_alive(link)

    def _has_news(self, room: Room, at: int) -> bool:
        return len(room.pages) > at or room.done is not None or bool(room.why)

    def _send(self, link: Link, sender: Sender, pages: NDArray[np.int32], room: Room, at: int, start: int) -> bool:
        """False: what was copied may be anything."""
        begun = monotonic()
        self._source.copy(pages, sender.rows(at - start, len(pages)))
        if not self._still(room):
            return False
        link.send(Pages(at, len(pages)), TALK)
        sender.push(link, at - start, len(pages), TALK)
        counts = self.counts
        counts.pages += len(pages)
        counts.nbytes += len(pages) * self._source.row_bytes
        counts.seconds += monotonic() - begun
        return True

    def _still(self, room: Room) -> bool:
        """Whether its lock, or that of more pages in its place, has been there all the time."""
        with self._news:
            return not room.why and room.hold is not None and room.hold in self._cache.holds
