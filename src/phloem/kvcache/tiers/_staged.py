"""For stores that move bytes by themselves: memory that they know, and calls that may fail or never return.

Rows are copied to a stage, each with its checksum behind it, and the store is told where they lie; what it brings is
believed where the checksum says so. A stage is registered once, whatever rows come, and rows are touched by nobody but
their caller: one that has been given up is not written to later.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from phloem.kvcache.tiers._segments import checksum
from phloem.utils import log, memory

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from phloem.kvcache.tiers import Row
    from phloem.utils.memory import Bytes

T = TypeVar("T")
_log = log.get("tiers")

AT_ONCE = 16  # rows of one call
CHECK_BYTES = 8
CALL_SECONDS = 10.0  # that a store may take for one call
REST = 5.0  # seconds that it is not asked after a failure
MOST_TOLD = 100


class StoreFailed(Exception):
    """The store gives no answer, or one that says that it cannot."""


class Stage:
    """`AT_ONCE` places of a row and its checksum. `registered`: what the store gave for it. `lost`: a call that hangs
    may still use it."""

    def __init__(self, row_bytes: int) -> None:
        self.nbytes = row_bytes + CHECK_BYTES  # of a place
        self.flat: Bytes = memory.zeros(AT_ONCE * self.nbytes)
        self._places = self.flat.reshape(AT_ONCE, self.nbytes)
        self.registered: Any = None
        self.lost = False

    def address(self, at: int) -> int:
        return self.flat.ctypes.data + at * self.nbytes

    def addresses(self, count: int) -> list[int]:
        return [self.address(at) for at in range(count)]

    def put(self, at: int, key: bytes, row: Row) -> None:
        place = self._places[at]
        place[:-CHECK_BYTES] = row
        place[-CHECK_BYTES:].view("<u8")[0] = _check(key, row)

    def get(self, at: int, key: bytes, row: Row) -> bool:
        """False: it is not what was written under this key, and the row may hold anything."""
        place = self._places[at]
        row[:] = place[:-CHECK_BYTES]
        return int(place[-CHECK_BYTES:].view("<u8")[0]) == _check(key, row)


def in_calls(keys: Sequence[bytes], rows: Sequence[Row], move: Callable[[Sequence[bytes], Sequence[Row]], int]) -> int:
    """`move` for `AT_ONCE` rows at a time, until one comes short: how many it has moved, the first ones of all."""
    done = 0
    while done < len(keys):
        some = keys[done : done + AT_ONCE]
        count = move(some, rows[done : done + AT_ONCE])
        done += count
        if count < len(some):
            break
    return done


def _check(key: bytes, row: Row) -> int:
    return zlib.crc32(key) << 32 | checksum(row)


class Distant:
    """A store that is asked in a thread for each call, so that one that hangs holds nobody up for long: until its call
    has returned it is not asked again. `register`: memory that it may read and write; a call as any other."""

    def __init__(self, what: str, row_bytes: int, register: Callable[[Stage], Any]) -> None:
        self.failed = self.corrupt = 0
        self._what, self._row_bytes, self._register = what, row_bytes, register
        self._lock = threading.Lock()
        self._stages: list[Stage] = []
        self._hanging: list[tuple[threading.Thread, Stage | None]] = []
        self._rest_until = 0.0
        self._told: set[str] = set()  # failures that the log has

    @property
    def away(self) -> bool:
        """It is left alone for now."""
        with self._lock:
            self._hanging = [(thread, stage) for thread, stage in self._hanging if thread.is_alive()]
            return bool(self._hanging) or monotonic() < self._rest_until

    def ask(self, call: Callable[[], T], otherwise: T, stage: Stage | None = None) -> T:
        """What the call gives; `otherwise` where it fails or takes too long, or the store is away. `stage`: what it
        reads or writes."""
        if self.away:
            return otherwise
        try:
            return self._bounded(call, stage)
        except Exception as error:
            self.fault(str(error) if isinstance(error, StoreFailed) else f"{type(error).__name__}: {error}")
            return otherwise

    def _bounded(self, call: Callable[[], T], stage: Stage | None) -> T:
        found: list[T] = []
        wrong: list[BaseException] = []

        def work() -> None:
            try:
                found.append(call())
            except BaseException as error:
                wrong.append(error)

        thread = threading.Thread(target=work, name="phloem-store", daemon=True)
        thread.start()
        thread.join(CALL_SECONDS)
        if wrong:
            raise wrong[0]
        if not found:
            with self._lock:
                self._hanging.append((thread, stage))
            if stage is not None:
                stage.lost = True
            raise StoreFailed(f"it has not answered within {CALL_SECONDS:g} s")
        return found[0]

    @contextlib.contextmanager
    def stage(self) -> Generator[Stage | None]:
        """One that nobody else has; None: the store is away, or takes no memory."""
        with self._lock:
            stage = self._stages.pop() if self._stages else None
        if stage is None and not self.away:
            made = Stage(self._row_bytes)
            made.registered = self.ask(lambda: self._register(made), None, made)
            stage = None if made.registered is None else made
        try:
            yield stage
        finally:
            if stage is not None and not stage.lost:
                with self._lock:
                    self._stages.append(stage)

    def fault(self, reason: str, rests: bool = True) -> None:
        """One line of the log for each kind of failure. `rests`: it is left alone for a while."""
        with self._lock:
            self.failed += 1
            if rests:
                self._rest_until = monotonic() + REST
            fresh = reason not in self._told and len(self._told) < MOST_TOLD
            self._told.add(reason)
        if fresh:
            _log.warning("%s: %s: pages are computed meanwhile", self._what, reason)

    def broken(self) -> None:
        """A row was not what was written."""
        with self._lock:
            self.corrupt += 1
        _log.warning("a page of %s is not what was written: it is computed again", self._what)

    def believed(self, stage: Stage, keys: Sequence[bytes], rows: Sequence[Row], drop: Callable[[bytes], None]) -> int:
        """Rows out of the stage, up to the first one that is not what was written, which is dropped: how many."""
        for at, (key, row) in enumerate(zip(keys, rows, strict=False)):
            if not stage.get(at, key, row):
                self.broken()
                drop(key)
                return at
        return len(keys)

    def end(self) -> list[Stage]:
        """Stages that nobody uses, and it rests no more: for `close`."""
        with self._lock:
            found, self._stages, self._rest_until = self._stages, [], 0.0
        return found
