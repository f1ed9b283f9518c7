"""Keys of pages: what their bytes depend on, so that whatever differs misses and nothing is ever taken for another.

A key is a digest of everything but the tokens (model, its files, types, layout, page size, ops) and the hash of the
page, which chains all tokens before its end behind the namespace (`kvcache.node.hashes`). Weights that were changed
while they serve, and adapters, are known by numbers that mean nothing in another process: their digest holds a number
of this process, so that nobody else finds such pages.
"""

from __future__ import annotations

import secrets
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from phloem.kvcache.namespaces import parts
from phloem.kvcache.node import HASH_BYTES, TOKEN_BYTES, chained, root_hash
from phloem.kvcache.tiers import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

SCHEMA = 1  # raised when rows are laid out otherwise
MOST_NAMESPACES = 4096


class Keys:
    """`facts`: what the content of pages depends on beside tokens and namespace, each a text."""

    def __init__(self, facts: Iterable[str], page_size: int) -> None:
        text = "\0".join([f"schema {SCHEMA}", f"page {page_size}", *facts])
        self.page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._lasting = _digest(text.encode())
        self._passing = _digest(self._lasting + secrets.token_bytes(16))
        self._roots: dict[str, tuple[bytes, bytes]] = {}

    def digest(self, namespace: str) -> bytes:
        _, adapter, version = parts(namespace)
        return self._passing if adapter or version else self._lasting

    def of(self, namespace: str, hashes: Iterable[bytes]) -> list[bytes]:
        """Keys of pages whose hashes the tree has."""
        digest = self.digest(namespace)
        return [digest + found for found in hashes]

    def grow(self, namespace: str, keys: list[bytes], tokens: NDArray[np.int32], pages: int) -> None:
        """Make `keys`, those of the first pages of `tokens`, those of its first `pages`, at least."""
        if len(keys) >= pages:
            return
        digest, above = self._root(namespace)
        if keys:
            above = keys[-1][KEY_BYTES - HASH_BYTES :]
        data = tokens[len(keys) * self.page_size : pages * self.page_size].tobytes()
        keys += [digest + found for found in chained(above, data, self._page_bytes)]

    def _root(self, namespace: str) -> tuple[bytes, bytes]:
        found = self._roots.get(namespace)
        if found is None:
            if len(self._roots) >= MOST_NAMESPACES:
                self._roots.clear()
            found = self._roots[namespace] = self.digest(namespace), root_hash(namespace)
        return found


def state_keys(key: bytes, count: int) -> list[bytes]:
    """Of the rows that hold the state at the end of the page with this key."""
    digest, page = key[: KEY_BYTES - HASH_BYTES], key[KEY_BYTES - HASH_BYTES :]
    return [digest + blake2b(b"state %d\0%b" % (at, page), digest_size=HASH_BYTES).digest() for at in range(count)]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=KEY_BYTES - HASH_BYTES).digest()
