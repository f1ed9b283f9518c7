"""Where computed pages go beyond the pool, to be read instead of computed again: a file for each kind of store.

Each has `Tier`, made of a `Place`, and may have `SETTINGS`: what the extra configuration may say to it alone, by name
(None: anything). A page is a row of bytes, found by a key of `KEY_BYTES` that stands for all tokens
up to its end and for everything else that its content depends on (`_keys.py`). Keys are given in the order of their
pages, and every answer is a *leading run*: how many of them, from the first on, are there, were read, or were written.
A page that fails ends the run, never a request: what is behind it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phloem.utils.registry import Registry

KEY_BYTES = 32
BLOCK = 4096  # the bytes of a row are a multiple of this, so that it is written without a copy

Row = np.ndarray[Any, np.dtype[np.uint8]]  # [row bytes], from a `BLOCK` border on


@dataclass(frozen=True)
class Place:
    """`page_bytes`: of a row. `most_bytes`: what all of them may take. `folder`: where files go. `extra`: what
    `--hicache-storage-backend-extra-config` says."""

    page_bytes: int
    most_bytes: int
    folder: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Tier(Protocol):
    """Called from several threads. None of these calls raises for a store that has gone, or has no room."""

    name: str
    instant: bool  # whether `exists` looks into memory alone

    def exists(self, keys: Sequence[bytes]) -> int: ...

    def read(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int: ...

    def write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int: ...

    def drop(self, keys: Sequence[bytes]) -> None: ...

    def clear(self) -> None: ...

    def stats(self) -> dict[str, float]:
        """For people: what is used, and what went wrong."""
        ...

    def close(self) -> None: ...


TIERS: Registry[Callable[[Place], Tier]] = Registry("phloem.kvcache.tiers", "cache tier", "Tier")


def rounded(page_bytes: int) -> int:
    """The bytes of a row that holds so many."""
    return -(-page_bytes // BLOCK) * BLOCK
