"""Pages in the tree of a group with a window: which are locked, and which of them go first.

A lease locks the pages that it may still read, page by page. What nobody has locked can be evicted without the node
that it belongs to, in this order, each kind from the least recently used node on:

1. pages from which no end of a node can be reached within the window,
2. those that make the end of a node with one child usable: of an earlier turn, or of a chunk,
3. those that make a leaf usable, or a place where branches part.

So a branch loses places where a match may end one after the other, and its own end last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from phloem.kvcache.node import Node

KINDS = 3


class WindowPages:
    """The account of one group. `index` is its place in `Node.windows`, `group` its number among all groups."""

    def __init__(self, index: int, group: int, window: int, num_pages: int, page_size: int) -> None:
        self.index, self.group = index, group
        self.reach = -(-(window - 1) // page_size)  # pages before a border that whoever goes on from it reads
        self.locks = np.zeros(num_pages, dtype=np.int32)
        self.entered = np.zeros(num_pages, dtype=np.int64)  # when a page came into the tree, in ticks of the tree
        self.live = 0  # pages in the tree
        self.locked = 0  # of these, pages that have locks
        self.loose: list[NDArray[np.int32]] = []  # left the tree; to be freed by whoever called
        self._order: tuple[dict[Node, None], ...] = tuple({} for _ in range(KINDS))

    @property
    def evictable(self) -> int:
        return self.live - self.locked

    def lock(self, pages: NDArray[np.int32]) -> None:
        self.locked += int((self.locks[pages] == 0).sum())
        self.locks[pages] += 1

    def unlock(self, pages: NDArray[np.int32], nodes: Iterable[Node]) -> None:
        """`nodes`: those that have the pages, deepest first; the deepest has been used last."""
        self.locks[pages] -= 1
        if (self.locks[pages] < 0).any():
            raise AssertionError(f"pages unlocked more often than locked: {pages[self.locks[pages] < 0].tolist()}")
        self.locked -= int((self.locks[pages] == 0).sum())
        for node in reversed(list(nodes)):
            for order in self._order:
                order.pop(node, None)
                order[node] = None

    def enter(self, pages: NDArray[np.int32], clock: int) -> None:
        """Pages of a new node; 0 where there is none."""
        there = pages[pages != 0]
        self.entered[there] = clock
        self.live += len(there)

    def merge(self, node: Node, ours: NDArray[np.int32], clock: int) -> NDArray[np.int32]:
        """Give a node what it lacks; `ours` [count] becomes what the tree has. Gives those that it had already."""
        theirs = node.windows[self.index]
        lacks = (theirs == 0) & (ours != 0)
        if lacks.any():
            theirs[lacks] = ours[lacks]
            self.enter(ours[lacks], clock)
        twice = (ours != 0) & (ours != theirs)
        freed = ours[twice]
        ours[twice] = theirs[twice]
        return freed

    def reshaped(self, node: Node) -> None:
        """The node has got or lost a child or pages: what it and those above it have may be of another kind now."""
        above = 0
        while node.parent is not None and above <= self.reach:
            for order in self._order:
                order.setdefault(node)
            above += node.count
            node = node.parent

    def leave(self, node: Node, start: int) -> None:
        """The node's pages from `start` on leave the tree, none of them locked."""
        pages = node.windows[self.index][start:]
        pages = pages[pages != 0]
        self.live -= len(pages)
        if len(pages):
            self.loose.append(pages)
        if start == 0:
            for order in self._order:
                order.pop(node, None)

    def evict(self, count: int, tell: Callable[[int, Node, NDArray[np.intp]], None] | None) -> list[Node]:
        """Make up to `count` pages loose; `tell` hears of them before. Gives the nodes that lost some."""
        touched: list[Node] = []
        for kind, order in enumerate(self._order):
            while count > 0 and order:
                node = next(iter(order))
                at = self.of_kind(node, kind)[:count]
                if len(at) == 0:
                    del order[node]
                    continue
                if tell is not None:
                    tell(self.group, node, at)
                pages = node.windows[self.index]
                self.loose.append(pages[at])
                pages[at] = 0
                self.live -= len(at)
                count -= len(at)
                touched.append(node)
        return touched

    def of_kind(self, node: Node, kind: int) -> NDArray[np.intp]:
        """Which pages of the node may be evicted and are of this kind."""
        wanted = self._wanted(node)
        end = max(wanted, min(self.reach, node.count))
        borders = (0, node.count - end, node.count - wanted, node.count)
        start, stop = borders[kind], borders[kind + 1]
        pages = node.windows[self.index][start:stop]
        return np.flatnonzero((pages != 0) & (self.locks[pages] == 0)) + start

    def _wanted(self, node: Node) -> int:
        """How many of its last pages the next leaf, or parting of branches, below it or at its end can reach."""
        below, at = 0, node
        while len(at.children) == 1:
            (at,) = at.children.values()
            below += at.count
            if below >= self.reach:
                return 0
        return min(node.count, self.reach - below)

    def taken_back(self, node: Node, mark: int) -> None:
        """What the node was given after the mark becomes loose."""
        pages = node.windows[self.index]
        late = (pages != 0) & (self.entered[pages] > mark)
        if late.any():
            self.loose.append(pages[late])
            self.live -= int(late.sum())
            pages[late] = 0

    def clear(self) -> None:
        self.locks[:] = 0
        self.live = self.locked = 0
        self.loose.clear()
        for order in self._order:
            order.clear()

    def check(self, nodes: list[Node], locks: NDArray[np.int32]) -> None:
        """Verify the account against the tree and the locks that are known of, int32 [num_pages].

        Raises:
            AssertionError: saying what does not add up.
        """
        pages = np.concatenate([np.empty(0, np.int32), *(node.windows[self.index] for node in nodes)])
        pages = pages[pages != 0]
        if len(pages) != self.live or self.loose:
            raise AssertionError(f"group {self.group}: {self.live} pages in the tree, counted {len(pages)}")
        inside = np.zeros(len(self.locks), dtype=np.bool_)
        inside[pages] = True
        if (self.locks != locks).any() or locks[~inside].any() or self.locked != int((locks > 0).sum()):
            wrong = np.flatnonzero((self.locks != locks) | ((locks > 0) & ~inside))[:8].tolist()
            raise AssertionError(f"group {self.group}: locks are wrong of pages {wrong}, or of {self.locked} in all")
        for node in nodes:
            for kind, order in enumerate(self._order):
                if node not in order and len(self.of_kind(node, kind)):
                    raise AssertionError(f"group {self.group}: node {node.uid} has pages that cannot be evicted")
