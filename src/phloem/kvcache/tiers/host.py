"""Rows in the memory of this machine: what was computed last, and what comes from a store or goes to one.

Each row of the block is free, or has users (`pins`), or is kept under its key until others need it: the one that was
not asked for longest goes first, of a chain its end.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from phloem.utils import memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kvcache.tiers import Place, Row


class Tier:
    name, instant = "host", True

    def __init__(self, place: Place) -> None:
        self.count = max(1, place.most_bytes // place.page_bytes)
        self._block = memory.zeros(self.count * place.page_bytes).reshape(self.count, place.page_bytes)
        self._lock = threading.Lock()
        self._found: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._key: list[bytes | None] = [None] * self.count
        self._pins = np.zeros(self.count, np.int32)
        self._free = list(range(self.count - 1, -1, -1))
        self.evicted = 0

    def row(self, index: int) -> Row:
        return self._block[index]

    @property
    def empty(self) -> bool:
        return not self._found

    @property
    def used(self) -> int:
        """Rows that are not free."""
        return self.count - len(self._free)

    # rows with users

    def take(self, count: int) -> list[int]:
        """Rows to fill, each with a pin: `count`, or fewer where others have users."""
        taken: list[int] = []
        with self._lock:
            while len(taken) < count and (self._free or self._evict()):
                taken.append(self._free.pop())
            self._pins[taken] = 1
        return taken

    def publish(self, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        """These rows are filled. Of a key that is there already the row before stays."""
        with self._lock:
            for key, row in zip(keys, rows, strict=True):
                if key not in self._found:
                    self._found[key], self._key[row] = row, key
            self._touch(keys)

    def find(self, keys: Sequence[bytes], start: int = 0) -> list[int]:
        """The rows of the leading run from the key `start` on, each with one more pin."""
        with self._lock:
            rows = [self._found[key] for key in keys[start : start + self._run(keys, start)]]
            np.add.at(self._pins, rows, 1)
            self._touch(keys[: start + len(rows)])
        return rows

    def unpin(self, rows: Sequence[int]) -> None:
        with self._lock:
            for row in rows:
                self._pins[row] -= 1
                if self._pins[row] < 0:
                    raise AssertionError(f"row {row} is let go more often than it was taken")
                if not self._pins[row] and self._key[row] is None:
                    self._free.append(row)

    def run(self, keys: Sequence[bytes], start: int = 0) -> int:
        """How many keys from `start` on are there, without a gap."""
        with self._lock:
            return self._run(keys, start)

    def _run(self, keys: Sequence[bytes], start: int) -> int:
        end = start
        while end < len(keys) and keys[end] in self._found:
            end += 1
        return end - start

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Used now; the end of the chain goes before its beginning."""
        for key in reversed(keys):
            if key in self._found:
                self._found.move_to_end(key)

    def _evict(self) -> bool:
        for _ in range(len(self._found)):
            key, row = next(iter(self._found.items()))
            if self._pins[row]:
                self._found.move_to_end(key)
                continue
            self._forget(key)
            self.evicted += 1
            return True
        return False

    def _forget(self, key: bytes) -> None:
        row = self._found.pop(key, None)
        if row is not None:
            self._key[row] = None
            if not self._pins[row]:
                self._free.append(row)

    # the contract

    def exists(self, keys: Sequence[bytes]) -> int:
        return self.run(keys)

    def read(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        found = self.find(keys)
        for row, target in zip(found, rows, strict=False):
            target[:] = self._block[row]
        self.unpin(found)
        return len(found)

    def write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        taken = self.take(len(keys))
        for row, source in zip(taken, rows, strict=False):
            self._block[row] = source
        self.publish(keys[: len(taken)], taken)
        self.unpin(taken)
        return len(taken)

    def drop(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in keys:
                self._forget(key)

    def clear(self) -> None:
        self.drop(list(self._found))

    def stats(self) -> dict[str, float]:
        with self._lock:
            pinned = int((self._pins > 0).sum())
            return {"pages": self.count, "used": self.used, "pinned": pinned, "evicted": self.evicted}

    def close(self) -> None:
        self.clear()

    def check(self) -> None:
        """Raises AssertionError where a row is in two places or in none."""
        with self._lock:
            kept = {row for row in self._found.values()}
            free = set(self._free)
            busy = set(np.flatnonzero(self._pins).tolist())
            whole = len(free) == len(self._free) and len(kept) == len(self._found)
            if not whole or free & (kept | busy) or len(free | kept | busy) != self.count:
                raise AssertionError(f"{len(free)} rows free, {len(kept)} kept, {len(busy)} in use of {self.count}")
