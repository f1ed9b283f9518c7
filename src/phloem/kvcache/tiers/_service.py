"""The tiers beyond the pool, as the scheduler sees them (`scheduler/further.py`).

Who owns what, when
-------------------
* A **row** of host memory is free, pinned by those that fill or read it, or kept under its key until others need it.
* Out of the pool: once the step that computed them is committed, pages of the tree are copied to rows between two steps
  (`Runner.between`). What frees and writes such a page anew is launched later, so nothing has to be locked for it. The
  rows are pinned until a thread has written them to the store.
* Into the pool: a request that enters a slot has pages of its own for what rows have behind its cached prefix; they are
  filled between two steps, in front of the step that was planned with them. The rows are pinned from the claim until
  then. The pages enter the tree with that step, as if it had computed them, and leave it if it never happened.
* From a store: threads fill rows while the request waits, with none of the pool's pages.

* A recurrent state is copied out as pages are, into rows of its own (`_states.py`), and in to a slot of its request.

A page is written once its whole beginning is: `exists` tells a leading run, and what follows is written behind it. A
row has the page of every group; where a window has lost one before it was written, the run ends there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from phloem.core.errors import BadRequest
from phloem.kvcache.namespaces import parts
from phloem.kvcache.node import hashes, path_to
from phloem.kvcache.tiers._fetch import Claim, Fetch, Waiting
from phloem.kvcache.tiers._states import States
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    from phloem.core.batch import Pending
    from phloem.kvcache.manager import CacheManager
    from phloem.kvcache.node import Node
    from phloem.kvcache.radix import Watch
    from phloem.kvcache.tiers import Row, Tier
    from phloem.kvcache.tiers._copies import Copies
    from phloem.kvcache.tiers._keys import Keys
    from phloem.kvcache.tiers.host import Tier as Host

T = TypeVar("T")
WritePolicy = Literal["write_through", "write_through_selective", "write_back"]
_log = log.get("tiers")

READERS = 2  # threads that fetch
FETCH_SECONDS = 0.003  # that a fetch takes however small it is
READ_RATE = 500e6  # bytes a second, until some were read
SWEEP = 64  # turns between two looks at chains of requests that have ended
MOST_SENT = 1 << 20  # keys of a distant store that are known to be there
FINISH_SECONDS = 8.0  # less than supervisors give beyond the drain


@dataclass
class Counts:
    """In pages, since the start."""

    prefetched: int = 0  # read from the store
    unfulfilled: int = 0  # the store said that it had them, and did not give them in time
    loaded: int = 0  # copied into the pool
    loaded_stored: int = 0  # of these, those that were fetched for their request
    load_seconds: float = 0.0
    written: int = 0  # to the store, or where there is none to rows
    dropped: int = 0  # not written for lack of rows
    failed: int = 0  # not taken by the store
    fetch_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **values: float) -> None:
        with self.lock:
            for name, value in values.items():
                setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Settings:
    """`threshold`: fewest tokens that are fetched; 0: as many as are read sooner than computed."""

    write: WritePolicy = "write_through"
    waiting: Waiting = Waiting()
    threshold: int = 0


@dataclass(frozen=True)
class Surroundings:
    """What the tiers ask of those around them, in the scheduler's thread. `between`: as `core.batch.Runner`.
    `version`: of the weights, as the namespace has it. `could_run`: whether a request that waits would run now.
    `prefill_rate`: tokens a second; 0: not known."""

    between: Callable[[Callable[[], None]], Pending[None]]
    version: Callable[[], str] = lambda: ""
    could_run: Callable[[], bool] = lambda: False
    prefill_rate: Callable[[], float] = lambda: 0.0
    clock: Callable[[], float] = perf_counter


class Tiers:
    """`host` keeps rows; `storage`, if there is one, what they are written to and fetched from."""

    def __init__(
        self,
        cache: CacheManager,
        copies: Copies,
        keys: Keys,
        host: Host,
        storage: Tier | None,
        settings: Settings,
        around: Surroundings,
    ) -> None:
        self.host, self.storage, self.settings, self.counts = host, storage, settings, Counts()
        self._cache, self._copies, self._keys, self._around = cache, copies, keys, around
        self._size = cache.page_size
        at_once = settings.write == "write_through"
        self._states = States(cache.states, -(-copies.state_bytes // len(host.row(0))), at_once)
        self._chains: dict[str, tuple[str, list[bytes]]] = {}
        self._fetches: dict[str, Fetch] = {}
        self._loads: list[tuple[Claim, NDArray[np.int32], int]] = []
        self._records: list[Node] = []  # that may have to be written
        self._saved: set[int] = set()  # nodes all of whose pages have been written, or are on their way
        self._stale = False  # some of these were not
        self._coming: set[bytes] = set()  # on their way
        self._sent: OrderedDict[bytes, None] = OrderedDict()
        self._sending = threading.Lock()  # of `_coming` and `_sent`
        self._horizon, self._turns, self._evicting = 0, 0, False
        self._writer_open = True
        self._readers = ThreadPoolExecutor(READERS, "phloem-tier-read")
        self._writer = ThreadPoolExecutor(1, "phloem-tier-write")
        self._inner: Watch | None = cache.tree.watch
        cache.tree.watch = self
        cache.on_evict = self._on_evict

    # what the tree says

    def added(self, node: Node) -> None:
        if self.settings.write == "write_through":
            self._records.append(node)
        if self._inner is not None:
            self._inner.added(node)

    def removed(self, node: Node, left: int) -> None:
        if not self._evicting:
            self._distrust(node, left)
        elif self.settings.write == "write_back" and node.created <= self._horizon:
            self._store([node])
        self._evicting = False
        if not left:
            self._saved.discard(node.uid)
        if self._inner is not None:
            self._inner.removed(node, left)

    def cleared(self) -> None:
        self._records.clear()
        self._states.clear()
        self._saved.clear()
        if self._inner is not None:
            self._inner.cleared()

    def _on_evict(self, group: int, pages: list[tuple[bytes, int]]) -> None:
        """What is removed next was computed, and is nobody's fault. Windows lose pages without their node."""
        del pages
        if group == 0:
            self._evicting = True

    def _distrust(self, node: Node, left: int) -> None:
        """The pages leave the tree because their request failed: what it computed is not believed anywhere."""
        if node.uid not in self._saved:
            return
        root = path_to(node)[0].parent
        assert root is not None
        keys = self._keys.of(root.name, hashes(node)[left:])
        keys += [one for key in keys for one in self._states.keys(key)]
        self.host.drop(keys)
        if self.storage is not None:
            self._writer.submit(self.storage.drop, keys)
            self._not_there(keys)

    # in: from the store to rows

    def fetch(self, request_id: str, namespace: str, tokens: NDArray[np.int32], limit: int) -> Fetch | None:
        self._begin(request_id)
        storage, pages = self.storage, min(limit, len(tokens)) // self._size
        if storage is None or pages <= 0:
            return None
        cached = self._cache.probe(namespace, tokens, limit).num_pages
        keys = self._chain(request_id, namespace, tokens, pages)
        start = cached + self.host.run(keys, cached)
        more = len(keys) - start
        if more and storage.instant:
            more = storage.exists(keys[start:])
        if self._states.rows:
            end = self._states.usable(request_id, keys, cached, start + more, lambda some: self._either(some, storage))
            keys = keys[:end] + (self._states.keys(keys[end - 1]) if end > cached else [])
            start = min(len(keys), cached + self.host.run(keys, cached))
            more = len(keys) - start
        if more <= 0 or not self._worth(more):
            return None
        keys = keys[: start + more]
        rows = self.host.find(keys, cached)
        start = cached + len(rows)
        fetch = Fetch(keys, start, rows, self._around.clock() + self.settings.waiting.seconds(more * self._size))
        fetch.clock = self._around.clock
        if self.settings.waiting.policy == "best_effort":
            fetch.could_run = self._around.could_run
        self._fetches[request_id] = fetch
        self._readers.submit(self._read, fetch, storage)
        return fetch

    def _either(self, keys: Sequence[bytes], storage: Tier) -> int:
        """How many keys, from the first on, are in rows or in the store."""
        at = self.host.run(keys)
        return at if at == len(keys) else at + storage.exists(keys[at:])

    def _begin(self, request_id: str) -> None:
        """Another one of this name may have ended since the last turn: its keys stand for other tokens."""
        self._chains.pop(request_id, None)
        self._states.forget(request_id)
        before = self._fetches.pop(request_id, None)
        if before is not None:
            before.let_go(self.host)

    def _read(self, fetch: Fetch, storage: Tier) -> None:
        begun, asked = perf_counter(), fetch.keys
        try:
            fetch.run(self.host, storage)
        except Exception:
            _log.exception("pages could not be fetched: they are computed")
        missing = len(fetch.keys) - fetch.start - fetch.read
        self.counts.add(prefetched=fetch.read, fetch_seconds=perf_counter() - begun, unfulfilled=max(0, missing))
        self._not_there(asked[len(fetch.keys) :])

    def _not_there(self, keys: Sequence[bytes]) -> None:
        """A distant store says so, or nothing. What was sent to it is sent again when it is computed again."""
        with self._sending:
            lost = [key for key in keys if key in self._sent]
            for key in lost:
                del self._sent[key]
        if lost:
            self._stale = True

    def _worth(self, pages: int) -> bool:
        """Whether so many pages are read sooner than they are computed."""
        tokens = pages * self._size
        if self.settings.threshold:
            return tokens >= self.settings.threshold
        rate, counts = self._around.prefill_rate(), self.counts
        if rate <= 0:
            return True
        row = self._copies.page_bytes
        read = counts.prefetched * row / counts.fetch_seconds if counts.fetch_seconds > 0.1 else READ_RATE
        return FETCH_SECONDS + pages * row / max(read, 1.0) < tokens / rate

    def _chain(self, request_id: str, namespace: str, tokens: NDArray[np.int32], pages: int) -> list[bytes]:
        name, keys = self._chains.get(request_id, ("", []))
        if name != namespace or not keys:
            keys = list[bytes]()
            self._chains[request_id] = namespace, keys
        self._keys.grow(namespace, keys, tokens, pages)
        return keys if len(keys) == pages else keys[:pages]

    # in: from rows to the pool

    def at_hand(self, request_id: str, namespace: str, tokens: NDArray[np.int32], start: int, limit: int) -> int:
        pages = min(limit, len(tokens)) // self._size
        if self.host.empty or start >= pages:
            return 0
        keys = self._chain(request_id, namespace, tokens, pages)
        end = start + self.host.run(keys, start)
        return self._states.usable(request_id, keys, start, end, self.host.run) - start

    def claim(self, request_id: str, namespace: str, tokens: NDArray[np.int32], start: int, limit: int) -> Claim | None:
        count = self.at_hand(request_id, namespace, tokens, start, limit)
        if not count:
            return None
        keys = self._chain(request_id, namespace, tokens, min(limit, len(tokens)) // self._size)
        if self._states.rows:
            keys = keys[: start + count]
        found = Claim(request_id, self.host.find(keys, start))
        if self._states.rows:
            found.state = self.host.find(self._states.keys(keys[-1]))
            if len(found.rows) < count or len(found.state) < self._states.rows:  # others have taken their rows
                self.give_up(found)
                return None
        fetch = self._fetches.get(request_id)
        if fetch is not None:
            found.stored = sum(key in fetch.arrived for key in keys[start : start + found.count])
        return found if found.count else None

    def give_up(self, claim: Claim) -> None:
        self.host.unpin(claim.rows + claim.state)

    def restore(self, claim: Claim, pages: NDArray[np.int32], state: int = 0) -> None:
        self._loads.append((claim, pages.copy(), state))
        self.counts.add(loaded=claim.count, loaded_stored=claim.stored)

    def launching(self) -> Pending[None] | None:
        if not self._loads:
            return None
        loads, self._loads = self._loads, []
        return self._around.between(lambda: self._load(loads))

    def _load(self, loads: list[tuple[Claim, NDArray[np.int32], int]]) -> None:
        begun = perf_counter()
        try:
            for claim, pages, state in loads:
                self._copies.into([self.host.row(row) for row in claim.rows], pages)
                if claim.state:
                    self._copies.state_into([self.host.row(row) for row in claim.state], state)
        finally:
            for claim, _, _ in loads:
                self.give_up(claim)
        self.counts.add(load_seconds=perf_counter() - begun)

    # out: from the pool to rows, and on

    def turn(self, horizon: int | None, live: Collection[str]) -> None:
        self._horizon = self._cache.mark() if horizon is None else horizon
        self._turns += 1
        if self._loads:  # their step was never launched
            for claim, _, _ in self._loads:
                self.give_up(claim)
            self._loads.clear()
        if self._records:
            due = [node for node in self._records if node.created <= self._horizon]
            if due:
                self._records = [node for node in self._records if node.created > self._horizon]
                self._store(due)
        for node in self._states.due(self._horizon):
            self._store_state(node)
        if self._fetches:
            for name in [name for name in self._fetches if name not in live]:
                self._fetches.pop(name).let_go(self.host)
        if self._turns % SWEEP == 0:
            for name in [name for name in self._chains if name not in live]:
                del self._chains[name]
                self._states.forget(name)

    def admitted(self, request_id: str, node: Node) -> None:
        """What was fetched for it is copied, or not wanted."""
        self._chains.pop(request_id, None)
        self._states.forget(request_id)
        fetch = self._fetches.pop(request_id, None)
        if fetch is not None:
            fetch.let_go(self.host)
        if self.settings.write == "write_through_selective" and node.parent is not None:
            self._records.append(node)
            self._states.note(node)

    def _store(self, nodes: Sequence[Node]) -> None:
        """Write what is not kept of these nodes, and of those above them, parents first."""
        if self._stale:
            self._stale = False
            self._saved.clear()
        keys: list[bytes] = []
        pages: list[NDArray[np.int32]] = []
        version = self._around.version()
        for node in nodes:
            path = path_to(node)
            if not path or node.uid in self._saved:
                continue
            root = path[0].parent
            assert root is not None
            if parts(root.name)[2] != version:
                continue  # other weights may have computed a part of it
            known = max((at for at, found in enumerate(path, 1) if found.uid in self._saved), default=0)
            rest = path[known:]
            more = self._keys.of(root.name, [one for found in rest for one in hashes(found)])
            kept = self._kept(more)
            columns = np.concatenate([self._pages_of(found) for found in rest], axis=1)
            lost = np.flatnonzero((columns[:, kept:] == 0).any(0))
            end = kept + int(lost[0]) if len(lost) else len(more)
            keys += more[kept:end]
            pages.append(columns[:, kept:end])
            with self._sending:
                self._coming.update(more[kept:end])
            for found in rest:
                end -= found.count
                if end < 0:
                    break
                self._saved.add(found.uid)
        if keys:
            self._write_out(keys, np.concatenate(pages, axis=1))

    def _store_state(self, node: Node) -> None:
        """Write the state at the end of a node, which has one. Its pages are written as all pages are."""
        root = path_to(node)[0].parent
        assert root is not None
        if parts(root.name)[2] != self._around.version():
            return
        keys = self._states.keys(self._keys.of(root.name, hashes(node)[-1:])[0])
        if self._kept(keys) == len(keys):
            return
        rows, slot = self.host.take(len(keys)), node.state
        if len(rows) < len(keys):
            self.host.unpin(rows)
            self.counts.add(dropped=len(keys))
            return
        with self._sending:
            self._coming.update(keys)
        self._around.between(lambda: self._copy_out(keys, rows, lambda into: self._copies.state_out(slot, into)))

    def _pages_of(self, node: Node) -> NDArray[np.int32]:
        """[groups, pages of the node]; 0 where a window has lost its page, or has one that is not computed yet."""
        windows = [
            np.where(account.entered[own] <= self._horizon, own, 0)
            for account, own in zip(self._cache.windows, node.windows, strict=True)
        ]
        return np.stack([node.pages, *windows])

    def _kept(self, keys: list[bytes]) -> int:
        """How many of these keys, from the first on, are kept or on their way."""
        at = 0
        while at < len(keys):
            at += self._there(keys[at:])
            before = at
            while at < len(keys) and keys[at] in self._coming:
                at += 1
            if at == before:
                break
        return at

    def _there(self, keys: Sequence[bytes]) -> int:
        if self.storage is None:
            return self.host.run(keys)
        if self.storage.instant:
            return self.storage.exists(keys)
        return next((at for at, key in enumerate(keys) if key not in self._sent), len(keys))

    def _write_out(self, keys: list[bytes], pages: NDArray[np.int32]) -> None:
        """Copy pages behind all that is launched, and let the store have them. Fewer where rows are short."""
        rows = self.host.take(len(keys))
        lost = keys[len(rows) :]
        if lost:
            self.counts.add(dropped=len(lost))
            self._forget_coming(lost)
        if rows:
            some, at = keys[: len(rows)], pages[:, : len(rows)]
            self._around.between(lambda: self._copy_out(some, rows, lambda into: self._copies.out(at, into)))

    def _copy_out(self, keys: list[bytes], rows: list[int], copy: Callable[[list[Row]], None]) -> None:
        try:
            copy([self.host.row(row) for row in rows])
            self.host.publish(keys, rows)
        except Exception:
            _log.exception("%d pages could not be copied from the pool", len(keys))
            self.host.unpin(rows)
            self._forget_coming(keys)
            return
        if self.storage is None:
            self.host.unpin(rows)
            self.counts.add(written=len(keys))
            self._forget_coming(keys, kept=True)
            return
        try:
            self._writer.submit(self._write, self.storage, keys, rows)
        except RuntimeError:  # the engine has closed
            self.host.unpin(rows)

    def _write(self, storage: Tier, keys: list[bytes], rows: list[int]) -> None:
        done = 0
        try:
            done = storage.write(keys, [self.host.row(row) for row in rows])
        except Exception:
            _log.exception("%d pages could not be written", len(keys))
        finally:
            self.host.unpin(rows)
            self.counts.add(written=done, failed=len(keys) - done)
            if not storage.instant:
                with self._sending:
                    self._sent.update(dict.fromkeys(keys[:done]))
                    while len(self._sent) > MOST_SENT:
                        self._sent.popitem(last=False)
            self._forget_coming(keys[:done], kept=True)
            self._forget_coming(keys[done:])

    def _forget_coming(self, keys: Sequence[bytes], kept: bool = False) -> None:
        with self._sending:
            self._coming.difference_update(keys)
        if keys and not kept:
            self._stale = True

    # the whole

    def flush(self) -> None:
        self.host.clear()

    def clear_storage(self) -> Future[int]:
        storage = self.storage
        if storage is None:
            raise BadRequest("there is no storage backend: start with --hicache-storage-backend", code="not_supported")

        def work() -> int:
            before = int(storage.stats().get("pages", 0))
            storage.clear()
            with self._sending:
                self._sent.clear()
            self._stale = True
            return before

        return self._writer.submit(work)

    def stats(self) -> dict[str, float]:
        """Fields of metrics; tokens, bytes and seconds."""
        counts, size = self.counts, self._size
        found: dict[str, float] = {
            "hicache_host_used_tokens": self.host.used * size,
            "hicache_host_total_tokens": self.host.count * size,
            "backuped_tokens": counts.written * size,
            "backup_dropped_tokens": (counts.dropped + counts.failed) * size,
            "load_back_tokens": counts.loaded * size,
            "load_back_bytes": counts.loaded * self._copies.page_bytes,
            "load_back_duration_seconds": counts.load_seconds,
        }
        if self.storage is not None:
            storage = self.storage.stats()
            found |= {
                "prefetched_tokens": counts.prefetched * size,
                "storage_prefetch_hit_tokens": counts.loaded_stored * size,
                "storage_prefetch_unfulfilled_tokens": counts.unfulfilled * size,
                "hicache_storage_used_tokens": storage.get("pages", 0) * size,
                "hicache_storage_used_bytes": storage.get("bytes", 0),
                "storage_failures": storage.get("failed", 0) + storage.get("corrupt", 0),
            }
        return found

    def state(self) -> dict[str, Any]:
        """For people."""
        found: dict[str, Any] = {**self.stats(), "host": self.host.stats(), "write_policy": self.settings.write}
        if self.storage is not None:
            found |= {"storage": {"backend": self.storage.name, **self.storage.stats()}}
            found |= {"prefetch_policy": self.settings.waiting.policy}
        return found

    @property
    def quiet(self) -> bool:
        """Nothing is on its way."""
        return not (self._coming or self._fetches or self._loads or self._records or self._states.waiting)

    def settle(self, seconds: float = FINISH_SECONDS) -> bool:
        """Wait until what was copied has been written. False: it takes longer."""
        end = perf_counter() + seconds
        self._around.between(lambda: None).result()
        try:
            self._writer.submit(lambda: None).result(max(0.0, end - perf_counter()))
        except TimeoutError:
            return False
        return True

    def finish(self) -> None:
        for name in list(self._fetches):
            self._fetches.pop(name).let_go(self.host)
        if self._writer_open and not self.settle():
            _log.warning("the engine ends before %d pages are written", len(self._coming))

    def close(self) -> None:
        """What has not been written is not."""
        self._writer_open = False
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True, cancel_futures=True)
        if self.storage is not None:
            self.storage.close()
        self.host.close()
