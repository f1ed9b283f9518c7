"""Rows in files of this machine, which outlive the process: `--hicache-storage-backend file`.

One process writes in a folder: the first of `replica-0`, `replica-1`, ... that nobody has locked is its own, and what
another process left there is found again. Only segments that this process knows are ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from time import monotonic
from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError
from phloem.kvcache.tiers._segments import (
    AT_ONCE,
    LOCK,
    Segment,
    Writer,
    checksum,
    forget,
    read_rows,
    remove,
    scan,
    size_of,
)
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phloem.kvcache.tiers import Place, Row

_log = log.get("tiers")

SEGMENT_BYTES = 64 << 20
FEWEST_SEGMENTS = 8  # that the whole room makes
MOST_OWNERS = 1024
REST = 30.0  # seconds without writing after a write that failed


class Tier:
    """Raises ConfigError where the folder cannot be had."""

    name, instant = "disk", True

    def __init__(self, place: Place) -> None:
        if place.folder is None:
            raise ConfigError("hicache_storage_backend_extra_config: the store of files needs a path")
        self._row_bytes, self._most = place.page_bytes, place.most_bytes
        self._each = max(1, min(SEGMENT_BYTES, self._most // FEWEST_SEGMENTS) // self._row_bytes)
        self._lock = threading.Lock()  # of the tables
        self._writing = threading.Lock()  # of `_writer`, and of files
        self._where: dict[bytes, Segment] = {}
        self._segments: list[Segment] = []
        self._writer: Writer | None = None
        self._clock = 0
        self._rest_until = 0.0
        self._told: set[str] = set()  # failures that the log has
        self.corrupt = self.failed = self.evicted = 0
        self._root, self._owner = place.folder, -1
        try:
            self._move_in()
        except OSError as error:
            text = f"hicache_storage_backend_extra_config: path: {place.folder}: {error.strerror or error}"
            raise ConfigError(text, param="hicache_storage_backend_extra_config") from None

    def _move_in(self) -> None:
        """Take a folder, with what is there. Raises OSError."""
        self.folder, self._owner = _own(self._root)
        found = scan(self.folder, self._row_bytes)
        self.foreign, self._next = found.foreign, found.highest + 1
        with self._lock:
            self._where.clear()
            for segment in found.segments:
                self._where.update(dict.fromkeys(segment.places, segment))
            self._segments = sorted(found.segments + found.others, key=lambda segment: segment.number)
            for segment in self._segments:
                segment.stamp = self._tick()
        self._make_room(0)
        if self._segments or self.foreign:
            _log.info(
                "%s: %d pages of earlier runs, %d files that are not ours", self.folder, len(self._where), self.foreign
            )

    def _move_out(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._owner >= 0:
            os.close(self._owner)
            self._owner = -1

    def _still_own(self) -> bool:
        """Whether the lock in the folder is the one that this process has: else somebody removed it, and the next
        process that looks for a folder takes this one."""
        try:
            return os.path.samestat(os.stat(self.folder / LOCK), os.fstat(self._owner))
        except OSError:
            return False

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    # the contract

    def exists(self, keys: Sequence[bytes]) -> int:
        with self._lock:
            return next((at for at, key in enumerate(keys) if key not in self._where), len(keys))

    def read(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        done = 0
        while done < len(keys):
            with self._lock:
                segment, places, checks = self._together(keys, done)
            if segment is None:
                break
            some = rows[done : done + len(places)]
            try:
                read_rows(segment, places, some)
            except OSError as error:
                self._lost(segment, error)
                break
            good = next((at for at, row in enumerate(some) if checksum(row) != checks[at]), len(some))
            if good < len(some):
                self._broken(segment, keys[done + good])
                return done + good
            done += good
        return done

    def _together(self, keys: Sequence[bytes], start: int) -> tuple[Segment | None, list[int], list[int]]:
        """The segment of the key at `start`, and the places and checksums of it and those behind it there."""
        first = self._where.get(keys[start])
        if first is None:
            return None, [], []
        first.stamp = self._tick()
        found: list[tuple[int, int]] = []
        for key in keys[start : start + AT_ONCE]:
            if self._where.get(key) is not first:
                break
            found.append(first.places[key])
        return first, [place for place, _ in found], [check for _, check in found]

    def write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        done = 0
        with self._writing:
            if monotonic() < self._rest_until:
                return 0
            try:
                if not self._still_own():
                    self._move_out()
                    self._move_in()
                while done < len(keys):
                    done += self._write_some(keys[done : done + AT_ONCE], rows[done : done + AT_ONCE])
            except OSError as error:
                self._stop_writing(error)
        return done

    def _write_some(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        """How many were dealt with: some may have been there already."""
        if self._writer is None or self._writer.segment.end >= self._each:
            self._begin_segment()
        assert self._writer is not None
        segment = self._writer.segment
        count = min(len(keys), self._each - segment.end)
        with self._lock:
            fresh = [at for at in range(count) if keys[at] not in self._where]
        if fresh:
            self._writer.write([keys[at] for at in fresh], [rows[at] for at in fresh])
        with self._lock:
            self._where.update({keys[at]: segment for at in fresh})
            for found in {id(self._where[key]): self._where[key] for key in reversed(keys[:count])}.values():
                found.stamp = self._tick()
        return count

    def _begin_segment(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._make_room(size_of(self._each, self._row_bytes))
        number, self._next = self._next, self._next + 1
        self._writer = Writer(self.folder, number, self._row_bytes)
        with self._lock:
            self._writer.segment.stamp = self._tick()
            self._segments.append(self._writer.segment)

    def _make_room(self, wanted: int) -> None:
        """Drop segments until so many bytes more are within the room."""
        while self._segments and self.nbytes + wanted > self._most:
            self._drop_segment(min(self._segments, key=lambda segment: segment.stamp))

    def _drop_segment(self, segment: Segment) -> None:
        with self._lock:
            self._segments.remove(segment)
            for key in segment.places:
                if self._where.get(key) is segment:
                    del self._where[key]
        self.evicted += len(segment.places)
        remove(segment)

    def _stop_writing(self, error: OSError) -> None:
        self.failed += 1
        self._rest_until = monotonic() + REST
        self._tell(f"write {error.errno}", f"pages are not written to {self.folder} for {REST:.0f} s", error)
        if self._writer is not None:
            segment = self._writer.segment
            self._writer.close()
            self._writer = None
            if not segment.end and segment in self._segments:
                self._drop_segment(segment)

    def _lost(self, segment: Segment, error: OSError) -> None:
        """Its rows cannot be read."""
        with self._lock:
            known = segment in self._segments
        if known:  # else it was dropped meanwhile
            self.failed += 1
            self._tell(f"read {error.errno}", f"{segment.rows.name} cannot be read and is forgotten", error)
            with self._writing:
                if self._writer is not None and self._writer.segment is segment:
                    self._writer.close()
                    self._writer = None
                if segment in self._segments:
                    self._drop_segment(segment)

    def _broken(self, segment: Segment, key: bytes) -> None:
        self.corrupt += 1
        _log.warning("a page in %s is not what was written: it is computed again", segment.rows.name)
        self.drop([key])

    def _tell(self, kind: str, text: str, error: OSError) -> None:
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("%s: %s", text, error.strerror or error)

    def drop(self, keys: Sequence[bytes]) -> None:
        with self._writing:  # a key that is written anew meanwhile would be forgotten with its row before
            with self._lock:
                gone = {key: segment for key in keys if (segment := self._where.pop(key, None)) is not None}
            if not self._still_own():
                return
            for segment in {id(found): found for found in gone.values()}.values():
                with contextlib.suppress(OSError):
                    forget(segment, [key for key, found in gone.items() if found is segment])

    def clear(self) -> None:
        with self._writing:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            for segment in list(self._segments):
                self._drop_segment(segment)
            self._rest_until = 0.0

    def stats(self) -> dict[str, float]:
        with self._lock:
            return {
                "pages": len(self._where),
                "bytes": self.nbytes,
                "segments": len(self._segments),
                "foreign_files": self.foreign,
                "evicted": self.evicted,
                "corrupt": self.corrupt,
                "failed": self.failed,
            }

    def close(self) -> None:
        with self._writing:
            self._move_out()


def _own(root: Path) -> tuple[Path, int]:
    """The first folder below `root` that no process has, and the lock on it. Raises OSError."""
    for number in range(MOST_OWNERS):
        folder = root / f"replica-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise  # a file system without locks
            continue
        return folder, fd
    raise OSError(errno.EBUSY, f"{MOST_OWNERS} servers use it")
