"""The decode side: prompts that another server computes, whose pages are fetched as they are offered.

A request waits (`core.late.Late`) while a thread of its own asks the prefill server for the pages that the tree here
lacks, and takes them into rows in host memory. Once all are here and the first token too, the request goes on as if it
had computed its prompt: the rows are claimed as it enters a slot, and copied into pages of its own between two steps
(`scheduler/further.py`). The few tokens behind the last whole page are computed here.

Whatever fails on the way, the request stops waiting and computes its prompt itself: nothing is lost but time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.disagg.bootstrap import PORT, Unknown
from phloem.disagg.wire import Alive, Ask, Done, Got, Link, LinkLost, Pages, Refused, digest_of
from phloem.kvcache.tiers._fetch import Claim
from phloem.utils import log

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phloem.core.batch import Pending
    from phloem.core.errors import PhloemError
    from phloem.core.messages import Did
    from phloem.disagg.bootstrap import Book, Peer
    from phloem.disagg.transports import Receiver, Row, Transport
    from phloem.kvcache.manager import CacheManager
    from phloem.kvcache.node import Node

_log = log.get("disagg")

BOOTSTRAP, TRANSFER = "bootstrap", "transfer"  # of what was done for a request
SILENCE = 2.0  # seconds without a sign of life, and a peer has gone
WAIT = 300.0  # seconds that prefill may take for a prompt


@dataclass(frozen=True)
class Target:
    """Where pages go. `copy`: rows to pages of the pool, for the thread that runs the steps. Else as `rooms.Source`."""

    copy: Callable[[Sequence[Row], NDArray[np.int32]], None]
    row_bytes: int
    facts: dict[str, str]
    weights: Callable[[], str]
    between: Callable[[Callable[[], None]], Pending[None]]
    most_bytes: int  # of rows that are filled at once
    vocab_size: int


@dataclass
class Counts:
    """Since the start."""

    fetched: int = 0
    failed: int = 0  # these computed their prompts themselves
    pages: int = 0
    nbytes: int = 0
    seconds: float = 0.0  # from asking to the first token
    load_seconds: float = 0.0


class Budget:
    """Bytes of rows: who would exceed them waits, unless it is alone."""

    def __init__(self, most: int) -> None:
        self._most, self._used, self._freed = most, 0, threading.Condition()

    def take(self, nbytes: int, stopped: Callable[[], bool]) -> bool:
        with self._freed:
            while self._used and self._used + nbytes > self._most:
                if stopped():
                    return False
                self._freed.wait(0.1)
            self._used += nbytes
            return True

    def give(self, nbytes: int) -> None:
        with self._freed:
            self._used -= nbytes
            self._freed.notify_all()

    @property
    def used(self) -> int:
        return self._used


class Arrival:
    """One prompt on its way. `first`: the first token, once everything is here."""

    error: PhloemError | None = None

    def __init__(self, ask: Ask, deadline: float) -> None:
        self.ask, self.deadline = ask, deadline
        self.why = ""
        self.did: list[Did] = []  # finding the server, and what it sent
        self.first: Done | None = None
        self.receiver: Receiver | None = None
        self.nbytes = 0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._link: Link | None = None
        self.dropped = False

    def ready(self) -> bool:
        return self._ended.is_set() or monotonic() >= self.deadline

    @property
    def ended(self) -> bool:
        """Its thread fills no more rows; what frees them otherwise is that thread."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """For tests."""
        return self._ended.wait(seconds)

    def linked(self, link: Link) -> None:
        with self._lock:
            self._link = link
        if self.dropped:
            raise LinkLost("the request has ended")

    def end(self, first: Done | None, why: str = "") -> None:
        self.first, self.why = first, why
        self._ended.set()

    def take_rows(self) -> tuple[Receiver | None, int]:
        """To free them, once: its thread and the scheduler's may both come here."""
        with self._lock:
            found, self.receiver, self.nbytes = (self.receiver, self.nbytes), None, 0
        return found

    def hang_up(self) -> None:
        """The request wants nothing more: the thread ends soon."""
        self.dropped = True
        with self._lock:
            link = self._link
        if link is not None and not self._ended.is_set():
            link.hang_up()


class Arrivals:
    """What a decode server waits for. Its public face is called in the scheduler's thread."""

    def __init__(self, cache: CacheManager, target: Target, book: Book, wait: float = WAIT) -> None:
        self.counts = Counts()
        self._cache, self._target, self._book, self._wait = cache, target, book, wait
        self._size = cache.page_size
        self._coming: dict[str, Arrival] = {}
        self._loads: list[tuple[Arrival, Claim, NDArray[np.int32]]] = []
        self._budget = Budget(target.most_bytes)

    def expect(
        self,
        request_id: str,
        room: str,
        host: str,
        port: int,
        namespace: str,
        prompt: NDArray[np.int32],
        adapter: str = "",
    ) -> Arrival:
        """Begin to fetch a prompt from the prefill server whose bootstrap server is there. `adapter`: as
        `wire.digest_of`."""
        end = len(prompt) // self._size
        start = min(end, self._cache.probe(namespace, prompt, len(prompt)).num_pages)
        facts = {**self._target.facts, "weight_version": self._target.weights()}
        found = Arrival(Ask(room, digest_of(prompt, adapter), start, end, facts), monotonic() + self._wait)
        self._coming[request_id] = found
        threading.Thread(target=self._run, args=(found, host, port or PORT), name="phloem-arrival", daemon=True).start()
        return found

    def first(self, request_id: str, did: list[Did] | None = None) -> Done | None:
        """What prefill says of a request that has stopped waiting; None: its prompt is computed here. `did`: where set,
        what was done for it is added."""
        found = self._coming.get(request_id)
        if found is None:
            return None
        if did is not None:
            did += found.did[:]
        first = found.first
        if first is not None and first.weights != self._target.weights():
            first, found.first, found.why = None, None, "the weights were changed"
        if first is None:
            self.counts.failed += 1
            found.hang_up()
            _log.warning(
                "request %s: room %s was not fetched: %s; its prompt is computed here",
                request_id, found.ask.room, found.why or f"it took more than {self._wait:g} s",
            )  # fmt: skip
            del self._coming[request_id]
            if found.ended:
                self._free(found)
        return first

    # a thread for each

    def _run(self, found: Arrival, host: str, port: int) -> None:
        begun, first, why = monotonic(), None, ""
        try:
            peer = self._book.find(host, port)
            first = self._talk(found, peer, host, port)
            self.counts.fetched += 1
            self.counts.seconds += monotonic() - begun
        except (LinkLost, Unknown, OSError) as error:
            self._book.forget(host, port)
            why = str(error)
        except Exception as error:
            _log.exception("room %s could not be fetched", found.ask.room)
            why = f"{type(error).__name__}: {error}"
        found.end(first, why)
        if found.dropped:
            self._free(found)

    def _talk(self, found: Arrival, peer: Peer, host: str, port: int) -> Done:
        ask = found.ask
        nbytes = (ask.end - ask.start) * self._target.row_bytes
        if not self._budget.take(nbytes, lambda: found.dropped):
            raise LinkLost("the request has ended")
        found.nbytes = nbytes
        begun = monotonic()
        transport, sock = self._connect(peer, host, port)
        link = Link(sock)
        try:
            found.linked(link)
            link.send(ask, SILENCE)
            receiver = found.receiver = transport.receiver(self._target.row_bytes, ask.end - ask.start)
            receiver.greet(link, SILENCE)
            found.did.append((BOOTSTRAP, begun, monotonic(), 0))
            return self._take(link, found, receiver)
        finally:
            link.close()

    def _connect(self, peer: Peer, host: str, port: int) -> tuple[Transport, socket.socket]:
        try:
            return self._book.connect(peer)
        except OSError:  # it may have been started again since it was asked
            self._book.forget(host, port)
            return self._book.connect(self._book.find(host, port))

    def _take(self, link: Link, found: Arrival, receiver: Receiver) -> Done:
        ask = found.ask
        at = ask.start
        while True:
            message = link.receive(SILENCE)
            if isinstance(message, Pages):
                if message.start != at or not 0 < message.count <= ask.end - at:
                    raise LinkLost(f"pages {message.start} to {message.start + message.count} were not asked for")
                begun, nbytes = monotonic(), message.count * self._target.row_bytes
                receiver.take(link, at - ask.start, message.count, SILENCE)
                found.did.append((TRANSFER, begun, monotonic(), nbytes))
                at += message.count
                self.counts.pages += message.count
                self.counts.nbytes += nbytes
            elif isinstance(message, Done):
                if at != ask.end:
                    raise LinkLost(f"only {at} of {ask.end} pages came")
                if why := self._nonsense(message):
                    raise LinkLost(f"{why} cannot be")
                link.send(Got(), SILENCE)
                return message
            elif isinstance(message, Refused):
                raise LinkLost(message.reason)
            elif not isinstance(message, Alive):
                raise LinkLost(f"{type(message).__name__} was not expected")

    def _nonsense(self, done: Done) -> str:
        """What a first token has that would break something here; "": nothing."""
        vocab = self._target.vocab_size
        if not 0 <= done.token < vocab:
            return f"token {done.token}"
        if done.cached < 0:
            return f"{done.cached} cached tokens"
        for position in (*done.logprobs, *done.prompt_logprobs):
            for _, token in (*position.top, *position.chosen):
                if not 0 <= token < vocab:
                    return f"token {token} of log probabilities"
        return ""

    def _free(self, found: Arrival) -> None:
        receiver, nbytes = found.take_rows()
        if receiver is not None:
            receiver.close()
        if nbytes:
            self._budget.give(nbytes)

    # as `scheduler.further.Further`

    def fetch(self, request_id: str, namespace: str, tokens: NDArray[np.int32], limit: int) -> None:
        """Its own pages are waited for by `expect`; those of one of the same name that has just ended are not its."""
        self._leave(request_id)

    def at_hand(self, request_id: str, namespace: str, tokens: NDArray[np.int32], start: int, limit: int) -> int:
        found = self._coming.get(request_id)
        if found is None or found.first is None or start < found.ask.start:
            return 0
        return max(0, min(found.ask.end, limit // self._size) - start)

    def claim(self, request_id: str, namespace: str, tokens: NDArray[np.int32], start: int, limit: int) -> Claim | None:
        count = self.at_hand(request_id, namespace, tokens, start, limit)
        if not count:
            return None
        first = start - self._coming[request_id].ask.start
        return Claim(request_id, list(range(first, first + count)))

    def give_up(self, claim: Claim) -> None:
        pass  # it is claimed again

    def restore(self, claim: Claim, pages: NDArray[np.int32], state: int = 0) -> None:
        self._loads.append((self._coming.pop(claim.request_id), claim, pages.copy()))

    def launching(self) -> Pending[None] | None:
        if not self._loads:
            return None
        loads, self._loads = self._loads, []
        return self._target.between(lambda: self._load(loads))

    def _load(self, loads: list[tuple[Arrival, Claim, NDArray[np.int32]]]) -> None:
        begun = monotonic()
        try:
            for found, claim, pages in loads:
                receiver = found.receiver
                if receiver is not None:
                    self._target.copy([receiver.row(row) for row in claim.rows], pages)
        finally:
            for found, _, _ in loads:
                self._free(found)
        self.counts.load_seconds += monotonic() - begun

    def admitted(self, request_id: str, node: Node) -> None:
        """It has entered a slot: what it has not claimed it does not want."""
        found = self._coming.pop(request_id, None)
        if found is not None:
            self._free(found)

    def turn(self, horizon: int | None, live: Collection[str]) -> None:
        for found, _, _ in self._loads:  # their step was never launched
            self._free(found)
        self._loads.clear()
        if self._coming:
            for name in [name for name in self._coming if name not in live]:
                self._leave(name)

    def _leave(self, request_id: str) -> None:
        """Nobody wants it any more."""
        found = self._coming.pop(request_id, None)
        if found is not None:
            found.hang_up()
            if found.ended:
                self._free(found)

    def flush(self) -> None:
        pass

    def clear_storage(self) -> Pending[int]:
        raise BadRequest("a decode server has no storage backend", code="not_supported")

    def stats(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        """For people, and for gateways."""
        counts, arrivals = self.counts, list(self._coming.values())
        return {
            "decode_prealloc_queue_reqs": 0,
            "decode_transfer_queue_reqs": sum(not found.ready() for found in arrivals),
            "rooms_fetched": counts.fetched,
            "rooms_failed": counts.failed,
            "kv_transfer_pages": counts.pages,
            "kv_transfer_bytes": counts.nbytes,
            "kv_row_bytes_held": self._budget.used,
            "load_seconds": counts.load_seconds,
        }

    def finish(self) -> None:
        for found in self._coming.values():
            found.hang_up()
