"""A radix tree over whole KV pages: which computed prefixes exist, and in which pages.

An edge holds the token ids of one or more pages as bytes, so that a whole edge is compared by one memcmp; children are
found by the bytes of their first page. Each namespace has a root of its own. Only leaves are evicted.

A node's `lock` counts the requests that hold it directly plus its locked children. Locking therefore walks up only to
the first ancestor that is locked already, and `evictable_pages` is exact at every moment.
The idea of sharing prefixes in a tree with LRU leaves is from RadixAttention (Zheng et al., SGLang, 2023).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

TOKEN_BYTES = 4
NO_PAGES = np.empty(0, dtype=np.int32)


class Node:
    """An edge and the place where it ends. `data` holds the token ids of `pages` as int32 bytes."""

    __slots__ = ("children", "created", "data", "hits", "lock", "name", "pages", "parent", "queued", "stamp", "uid")

    def __init__(self, uid: int, parent: Node | None, data: bytes, pages: NDArray[np.int32], stamp: int) -> None:
        self.uid = uid
        self.parent = parent
        self.data = data
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.lock = 0
        self.hits = 0
        self.stamp = stamp  # last use, in ticks of the tree
        self.created = stamp
        self.name = ""  # the namespace, on a root
        self.queued = False  # an entry for this node is in the eviction heap


@dataclass(slots=True)
class Found:
    """A prefix in the tree: `node` ends exactly after `num_pages`, or is None when the prefix ends inside an edge."""

    num_pages: int
    node: Node | None


def _lru(node: Node) -> tuple[int, int]:
    return node.stamp, 0


def _lfu(node: Node) -> tuple[int, int]:
    return node.hits, node.stamp


def _fifo(node: Node) -> tuple[int, int]:
    return node.created, 0


RANKS: dict[str, Callable[[Node], tuple[int, int]]] = {"lru": _lru, "lfu": _lfu, "fifo": _fifo}


class RadixCache:
    """The tree. It knows page ids but owns no free list: who drops pages gets them back as arrays."""

    def __init__(self, page_size: int, eviction: str = "lru") -> None:
        if eviction not in RANKS:
            raise ValueError(f"unknown eviction {eviction!r}; known: {', '.join(sorted(RANKS))}")
        self.page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._rank = RANKS[eviction]
        self._roots: dict[str, Node] = {}
        self._heap: list[tuple[tuple[int, int], int, Node]] = []
        self._clock = 0
        self._uids = 0
        self.version = 0  # changes whenever a match may give another answer
        self.pages = 0
        self.evictable_pages = 0
        self.num_nodes = 0

    # looking

    def find(self, namespace: str, data: bytes, limit: int) -> Found:
        """The longest prefix of `data` (whole pages, at most `limit` pages) that the tree has. Changes nothing."""
        node = self._roots.get(namespace)
        if node is None:
            return Found(0, None)
        size, done = self._page_bytes, 0
        while done < limit:
            child = node.children.get(data[done * size : (done + 1) * size])
            if child is None:
                break
            same = self._common(child, data, done, limit)
            done += same
            if same < len(child.pages):
                return Found(done, None)
            node = child
        return Found(done, node)

    def take(self, namespace: str, data: bytes, limit: int) -> tuple[Node, NDArray[np.int32]]:
        """Match as `find` does, split where the match ends, count the hit and lock the node; gives node and pages."""
        self._clock += 1
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = self._new(None, b"", NO_PAGES)
            node.name = namespace
        size, done = self._page_bytes, 0
        found: list[NDArray[np.int32]] = []
        while done < limit:
            child = node.children.get(data[done * size : (done + 1) * size])
            if child is None:
                break
            same = self._common(child, data, done, limit)
            node = child if same == len(child.pages) else self._split(child, same)
            node.stamp = self._clock
            node.hits += 1
            found.append(node.pages)
            done += same
        self.lock(node)
        if not found:
            return node, NO_PAGES
        return node, found[0] if len(found) == 1 else np.concatenate(found)

    def _common(self, child: Node, data: bytes, done: int, limit: int) -> int:
        """How many leading pages of the edge equal `data` from page `done` on; the first is known to."""
        size = self._page_bytes
        count = len(child.pages)
        if done + count <= limit and data.startswith(child.data, done * size):
            return count
        count = min(count, limit - done)
        width = count * self.page_size
        theirs = np.frombuffer(child.data, np.int32, width)
        ours = np.frombuffer(data, np.int32, width, done * size)
        differs = np.flatnonzero(theirs != ours)
        return count if len(differs) == 0 else int(differs[0]) // self.page_size

    # locks

    def lock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            at.lock += 1
            if at.lock > 1:
                return
            self.evictable_pages -= len(at.pages)
            at = at.parent

    def unlock(self, node: Node) -> None:
        self._clock += 1
        node.stamp = self._clock
        at: Node | None = node
        while at is not None:
            at.lock -= 1
            if at.lock > 0:
                return
            if at.lock < 0:
                raise AssertionError(f"node {at.uid} unlocked more often than locked")
            self.evictable_pages += len(at.pages)
            parent = at.parent
            if not at.children:
                self._offer(at)
            at = parent

    # growing

    def extend(self, node: Node, data: bytes, pages: NDArray[np.int32]) -> tuple[Node, NDArray[np.int32]]:
        """Put pages with token ids `data` under a node that the caller has locked.

        Returns (node, kept): the node where they end, which holds the caller's lock instead of the old one; and for
        each page the one that the tree has. Where `kept` differs, the tree had it already: the caller frees its own.
        """
        self._clock += 1
        size, done, count = self._page_bytes, 0, len(pages)
        kept = pages.copy()
        at = node
        while done < count:
            child = at.children.get(data[done * size : (done + 1) * size])
            if child is None:
                at = self._add(at, data[done * size :], kept[done:].copy())
                break
            same = self._common(child, data, done, count)
            at = child if same == len(child.pages) else self._split(child, same)
            at.stamp = self._clock
            kept[done : done + same] = at.pages
            done += same
        if at is not node:
            self.lock(at)
            node.lock -= 1  # still locked through its child
        return at, kept

    def _add(self, parent: Node, data: bytes, pages: NDArray[np.int32]) -> Node:
        node = self._new(parent, data, pages)
        parent.children[data[: self._page_bytes]] = node
        self.pages += len(pages)
        self.evictable_pages += len(pages)
        self.num_nodes += 1
        self.version += 1
        return node

    def _new(self, parent: Node | None, data: bytes, pages: NDArray[np.int32]) -> Node:
        self._uids += 1
        return Node(self._uids, parent, data, pages, self._clock)

    def _split(self, node: Node, count: int) -> Node:
        """Cut an edge after `count` pages; the upper part is new, the lower part stays the node that others hold."""
        parent = node.parent
        assert parent is not None and 0 < count < len(node.pages)
        size = self._page_bytes
        upper = self._new(parent, node.data[: count * size], node.pages[:count])
        upper.stamp, upper.hits, upper.created = node.stamp, node.hits, node.created
        upper.lock = 1 if node.lock else 0
        parent.children[upper.data[:size]] = upper
        node.data, node.pages, node.parent = node.data[count * size :], node.pages[count:], upper
        upper.children[node.data[:size]] = node
        self.num_nodes += 1
        return upper

    # shrinking

    def evict(self, count: int) -> NDArray[np.int32]:
        """Drop up to `count` unlocked pages, worst ranked leaves first and each from its end; gives the pages."""
        freed: list[NDArray[np.int32]] = []
        while count > 0 and self._heap:
            rank, _, node = heapq.heappop(self._heap)
            node.queued = False
            if node.lock or node.children or node.parent is None:
                continue
            if self._rank(node) != rank:
                self._offer(node)
                continue
            freed.append(self._shorten(node, min(count, len(node.pages))))
            count -= len(freed[-1])
        return np.concatenate(freed) if freed else NO_PAGES

    def forget(self, node: Node) -> NDArray[np.int32]:
        """Drop an unlocked branch from its end up to the first node that others need; gives the pages."""
        freed: list[NDArray[np.int32]] = []
        while (parent := node.parent) is not None and not node.lock and not node.children:
            freed.append(self._shorten(node, len(node.pages)))
            node = parent
        return np.concatenate(freed) if freed else NO_PAGES

    def mark(self) -> int:
        """A moment, for `ancestor_before` and `forget_since`."""
        return self._clock

    def ancestor_before(self, node: Node, mark: int, limit: int) -> tuple[Node, int]:
        """The deepest node on the path to `node`, itself included, that is older than the mark and ends within `limit`
        pages; else the root. With the number of pages up to its end.
        """
        depth, at = 0, node
        while at.parent is not None:
            depth += len(at.pages)
            at = at.parent
        while node.parent is not None and (node.created > mark or depth > limit):
            depth -= len(node.pages)
            node = node.parent
        return node, depth

    def forget_since(self, mark: int) -> NDArray[np.int32]:
        """Drop every node that was added after the mark; none may be locked. Gives the pages."""
        fresh = [node for node in self.nodes() if node.created > mark]
        freed: list[NDArray[np.int32]] = []
        for node in reversed(fresh):  # nothing old hangs below something new: children come first here
            if node.lock or node.children:
                raise AssertionError(f"node {node.uid} is in use and cannot be forgotten")
            freed.append(self._shorten(node, len(node.pages)))
        return np.concatenate(freed) if freed else NO_PAGES

    def clear(self) -> None:
        """Forget everything, locks included: for a reset in which no request holds anything any more."""
        for node in list(self.nodes()):
            node.parent = None
        self._roots.clear()
        self._heap.clear()
        self.pages = self.evictable_pages = self.num_nodes = 0
        self.version += 1

    def _shorten(self, node: Node, count: int) -> NDArray[np.int32]:
        left = len(node.pages) - count
        freed = node.pages[left:]
        self.pages -= count
        self.evictable_pages -= count
        self.version += 1
        if left:
            node.data, node.pages = node.data[: left * self._page_bytes], node.pages[:left].copy()
            self._offer(node)
            return freed
        parent = node.parent
        assert parent is not None
        del parent.children[node.data[: self._page_bytes]]
        node.parent = None
        self.num_nodes -= 1
        if not parent.children and not parent.lock:
            self._offer(parent)
        return freed

    def _offer(self, node: Node) -> None:
        """An unlocked leaf may be evicted; a root without children has no use at all."""
        if node.parent is None:
            self._roots.pop(node.name, None)
            return
        if not node.queued:
            node.queued = True
            heapq.heappush(self._heap, (self._rank(node), node.uid, node))

    # reports

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first."""
        for _, _, node in self._walk():
            yield node

    def _walk(self) -> Iterator[tuple[str, int, Node]]:
        for name, root in self._roots.items():
            level = [(0, iter(root.children.values()))]
            while level:
                following: list[tuple[int, Iterator[Node]]] = []
                for depth, children in level:
                    for node in children:
                        yield name, depth, node
                        following.append((depth + len(node.pages), iter(node.children.values())))
                level = following

    def snapshot(self, max_nodes: int = 512, preview: int = 16) -> list[dict[str, Any]]:
        """The first `max_nodes` nodes, parents first: sizes in tokens, with the first `preview` token ids of each."""
        found: list[dict[str, Any]] = []
        for name, depth, node in self._walk():
            if len(found) == max_nodes:
                break
            parent = node.parent.uid if node.parent is not None and node.parent.parent is not None else 0
            found.append(
                {
                    "id": node.uid,
                    "parent": parent,
                    "namespace": name,
                    "start": depth * self.page_size,
                    "tokens": len(node.pages) * self.page_size,
                    "first_ids": np.frombuffer(node.data, np.int32, min(preview, len(node.data) // 4)).tolist(),
                    "hits": node.hits,
                    "locks": node.lock,
                    "children": len(node.children),
                    "last_used": node.stamp,
                }
            )
        return found
