"""A node of the prefix tree: an edge of whole pages, and what each group of memory keeps of it."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

TOKEN_BYTES = 4
HASH_BYTES = 16
NO_PAGES = np.empty(0, dtype=np.int32)
NO_WINDOWS: tuple[NDArray[np.int32], ...] = ()


class Node:
    """An edge and the place where it ends. `data` holds the token ids of its `count` pages as int32 bytes.

    `pages`: of the group that keeps everything, int32 [count]; empty for a model without one. `windows`: of each
    group with a window, int32 [count], 0 where the page is lost. `state`: the slot of the state at its end, or 0.
    """

    __slots__ = (
        "chain",
        "children",
        "count",
        "created",
        "data",
        "hits",
        "lock",
        "name",
        "pages",
        "parent",
        "queued",
        "stamp",
        "state",
        "uid",
        "windows",
    )

    def __init__(
        self,
        uid: int,
        parent: Node | None,
        data: bytes,
        count: int,
        pages: NDArray[np.int32],
        stamp: int,
        windows: Sequence[NDArray[np.int32]] = NO_WINDOWS,
    ) -> None:
        self.uid = uid
        self.parent = parent
        self.data = data
        self.count = count
        self.pages = pages
        self.windows = windows
        self.state = 0
        self.children: dict[bytes, Node] = {}
        self.lock = 0
        self.hits = 0
        self.stamp = stamp  # last use, in ticks of the tree
        self.created = stamp
        self.name = ""  # the namespace, on a root
        self.queued = False  # an entry for this node is in the eviction heap
        self.chain: list[bytes] | None = None  # `hashes`, once somebody has asked

    @property
    def bare(self) -> bool:
        """Nothing is kept of it in any group."""
        return not len(self.pages) and not self.state and not any(pages.any() for pages in self.windows)


def path_to(node: Node) -> list[Node]:
    """The nodes from below the root to `node`, itself included."""
    path: list[Node] = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    path.reverse()
    return path


def ends_between(node: Node, depth: int, start: int, end: int) -> Iterator[Node]:
    """Nodes on the path to `node`, which ends at page `depth`, that have pages in [start, end), deepest first."""
    at: Node | None = node
    while at is not None and depth > start:
        first = depth - at.count
        if first < end:
            yield at
        depth, at = first, at.parent


def hashes(node: Node) -> list[bytes]:
    """A hash for each page of the node, which stands for all tokens up to the page's end, and for the namespace.

    Each is BLAKE2b, 16 bytes, of the hash before it and the page's token ids; the first follows that of the namespace.
    Computed on the first call, and kept.
    """
    missing: list[Node] = []
    at = node
    while at.parent is not None and at.chain is None:
        missing.append(at)
        at = at.parent
    for found in reversed(missing):
        parent = found.parent
        assert parent is not None
        above = parent.chain[-1] if parent.chain else root_hash(parent.name)
        found.chain = chained(above, found.data, len(found.data) // found.count)
    return node.chain or []


def root_hash(namespace: str) -> bytes:
    """What stands before the first page of a namespace."""
    return _hash(namespace.encode())


def chained(above: bytes, data: bytes, size: int) -> list[bytes]:
    """As `hashes`, of pages of `size` bytes of token ids that follow the page whose hash is `above`."""
    chain: list[bytes] = []
    for start in range(0, len(data), size):
        above = _hash(above + data[start : start + size])
        chain.append(above)
    return chain


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()
