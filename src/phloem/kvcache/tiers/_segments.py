"""Files of a folder that keep rows: segments, each with an index of checksummed records beside it.

    segment-00000001.kv     rows, one behind the other
    segment-00000001.idx    a header, and a record for each row: key, place, checksum of the row, checksum of the record

A row is written before its record, and a record is only believed with its checksum: what a killed process leaves is a
shorter index, and what a lost machine leaves is a row whose checksum is wrong. A whole segment is dropped at once, the
one that was not asked for longest. Files that are not of this kind are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from phloem.kvcache.tiers import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kvcache.tiers import Row

MAGIC = b"PHLOEMKV"
LOCK = "lock"  # of the process whose folder it is
_HEADER = struct.Struct("<8sIII")  # magic, version, row bytes, checksum of these
_RECORD = struct.Struct(f"<{KEY_BYTES}sIII")  # key, place, checksum of the row, checksum of the record
VERSION = 1
GONE = 0xFFFFFFFF  # as a place: the key before is forgotten
_NAME = re.compile(r"segment-(\d{8})\.(kv|idx)")
AT_ONCE = 64  # rows of one call to the system
_WIDTH = 256  # words


def checksum(row: Row) -> int:
    """CRC-32 of the sums of a row's words, by rows and by columns of a square: four times as fast as CRC-32 of the
    whole, and two changes that hide each other in one kind of sums show in the other."""
    words = row.view(np.uint64)
    whole = len(words) // _WIDTH * _WIDTH
    square = words[:whole].reshape(-1, _WIDTH)
    sums = zlib.crc32(square.sum(0, dtype=np.uint64).tobytes(), zlib.crc32(words[whole:].tobytes()))
    return zlib.crc32(square.sum(1, dtype=np.uint64).tobytes(), sums)


@dataclass(eq=False)
class Segment:
    """`places`: where each key's row is, and its checksum. `end`: rows that have been written."""

    number: int
    rows: Path
    index: Path
    places: dict[bytes, tuple[int, int]] = field(default_factory=dict[bytes, tuple[int, int]])
    end: int = 0
    stamp: int = 0  # when it was last asked for
    nbytes: int = 0  # on disk, both files


def size_of(rows: int, row_bytes: int) -> int:
    """Bytes of a segment with so many rows, both files."""
    return _HEADER.size + rows * (row_bytes + _RECORD.size)


def names(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"segment-{number:08d}.kv", folder / f"segment-{number:08d}.idx"


@dataclass
class Scan:
    """What a folder has: `segments` that can be read, `others` whose rows are of another size (`nbytes` alone counts),
    `foreign` files that are none of ours, and the highest number that any file has. What a process that ended in the
    middle left empty is removed."""

    segments: list[Segment]
    others: list[Segment]
    foreign: int
    highest: int


def scan(folder: Path, row_bytes: int) -> Scan:
    """Raises OSError."""
    found = Scan([], [], 0, 0)
    numbers: set[int] = set()
    for entry in os.scandir(folder):
        match = _NAME.fullmatch(entry.name)
        if match is None or not entry.is_file(follow_symlinks=False):
            found.foreign += entry.name != LOCK
            continue
        numbers.add(int(match[1]))
    for number in sorted(numbers):
        found.highest = max(found.highest, number)
        segment = Segment(number, *names(folder, number))
        size = _read_index(segment, row_bytes)
        if size is None:
            found.foreign += 0 if _never_begun(segment) else segment.rows.exists() + segment.index.exists()
        elif size == row_bytes and not segment.places:
            remove(segment)
        elif size == row_bytes:
            found.segments.append(segment)
        else:
            found.others.append(segment)
    return found


def _never_begun(segment: Segment) -> bool:
    """Whether its files were made and not one byte written; they are removed."""
    try:
        sizes = [path.stat().st_size for path in (segment.index, segment.rows) if path.exists()]
    except OSError:
        return False
    if any(sizes) or not segment.index.exists():
        return False
    remove(segment)
    return True


def remove(segment: Segment) -> None:
    for path in (segment.index, segment.rows):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _read_index(segment: Segment, row_bytes: int) -> int | None:
    """Fill a segment from its files; the size of its rows, or None: these are not ours. What is torn off the index, or
    damaged, is cut off: records that are added to it later would stand behind it, where none is believed."""
    try:
        data = segment.index.read_bytes()
        length = segment.rows.stat().st_size
    except OSError:
        return None
    size = read_header(data)
    if size is None:
        return None
    segment.nbytes = length + len(data)
    if size != row_bytes:
        return size
    end = _HEADER.size
    for start in range(_HEADER.size, len(data) - _RECORD.size + 1, _RECORD.size):
        key, place, check, crc = _RECORD.unpack_from(data, start)
        if zlib.crc32(data[start : start + _RECORD.size - 4]) != crc:
            break  # cut off, or overwritten: nothing behind it is believed
        end = start + _RECORD.size
        if place == GONE:
            segment.places.pop(key, None)
        elif (place + 1) * row_bytes <= length:
            segment.places[key] = place, check
    if end < len(data):
        with contextlib.suppress(OSError):
            os.truncate(segment.index, end)
    segment.end = length // row_bytes
    return size


def header(row_bytes: int) -> bytes:
    body = _HEADER.pack(MAGIC, VERSION, row_bytes, 0)[:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def read_header(data: bytes) -> int | None:
    """The size of rows that an index is of; None: it is no such file."""
    if len(data) < _HEADER.size:
        return None
    magic, version, size, crc = _HEADER.unpack_from(data)
    right = magic == MAGIC and version == VERSION and crc == zlib.crc32(data[: _HEADER.size - 4])
    return size if right and size else None


def record(key: bytes, place: int, check: int) -> bytes:
    body = _RECORD.pack(key, place, check, 0)[:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def open_rows(path: Path, flags: int) -> int:
    """Past the system's cache where the file system can: a row is in memory already, or wanted once. Raises OSError."""
    direct = vars(os).get("O_DIRECT", 0)
    try:
        return os.open(path, flags | direct, 0o600)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        return os.open(path, flags & ~os.O_EXCL, 0o600)  # the file may have been made all the same


class Writer:
    """The one segment that grows. Raises OSError from every call."""

    def __init__(self, folder: Path, number: int, row_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.segment = Segment(number, *names(folder, number))
        self._row_bytes = row_bytes
        self._index = os.open(self.segment.index, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._rows = -1
        try:
            self._rows = open_rows(self.segment.rows, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            _whole(os.write(self._index, header(row_bytes)), _HEADER.size)
        except OSError:
            self.close()
            remove(self.segment)
            raise
        self.segment.nbytes = _HEADER.size

    def write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> None:
        """Up to `AT_ONCE` rows, then their records."""
        segment, size = self.segment, self._row_bytes
        _whole(os.pwritev(self._rows, cast("Any", rows), segment.end * size), len(rows) * size)
        told: list[bytes] = []
        places: dict[bytes, tuple[int, int]] = {}
        for key, row in zip(keys, rows, strict=True):
            places[key] = segment.end + len(told), checksum(row)
            told.append(record(key, *places[key]))
        _whole(os.write(self._index, b"".join(told)), len(told) * _RECORD.size)
        segment.end += len(rows)
        segment.nbytes += len(rows) * (size + _RECORD.size)
        segment.places |= places

    def close(self) -> None:
        for fd in (self._rows, self._index):
            if fd >= 0:
                os.close(fd)
        self._rows = self._index = -1


def _whole(done: int, wanted: int) -> None:
    if done != wanted:
        raise OSError(errno.ENOSPC, f"only {done} of {wanted} bytes were written")


def forget(segment: Segment, keys: Sequence[bytes]) -> None:
    """Keys whose rows are not to be believed, also by whoever reads the index later. Raises OSError."""
    for key in keys:
        segment.places.pop(key, None)
    fd = os.open(segment.index, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, b"".join(record(key, GONE, 0) for key in keys))
    finally:
        os.close(fd)


def read_rows(segment: Segment, places: Sequence[int], rows: Sequence[Row]) -> None:
    """Rows at these places, of which those that follow each other are read at once. Raises OSError."""
    fd = open_rows(segment.rows, os.O_RDONLY)
    try:
        start = 0
        while start < len(places):
            end = start + 1
            while end < len(places) and end - start < AT_ONCE and places[end] == places[end - 1] + 1:
                end += 1
            some = rows[start:end]
            wanted = sum(len(row) for row in some)
            if os.preadv(fd, cast("Any", some), places[start] * len(some[0])) != wanted:
                raise OSError(errno.EIO, f"{segment.rows.name} is shorter than its index says")
            start = end
    finally:
        os.close(fd)
