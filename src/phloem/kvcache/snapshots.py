"""Slots of state in the tree: snapshots at the ends of nodes, and which of them goes first.

A snapshot is never written again. A lease that reads one has locked it; of those that nobody has locked the least
recently read goes first. Reading one touches that one alone, not those above it on its path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from phloem.kvcache.node import Node


class Snapshots:
    """The account of the group of states; `group` is its number among all groups."""

    def __init__(self, group: int, num_slots: int) -> None:
        self.group = group
        self.locks = np.zeros(num_slots, dtype=np.int32)
        self.entered = np.zeros(num_slots, dtype=np.int64)  # when a slot came into the tree, in ticks of the tree
        self.owner: dict[int, Node] = {}
        self.loose: list[int] = []  # left the tree; to be freed by whoever called
        self.watch: Callable[[Node], None] | None = None  # hears of each node that gains one
        self._order: dict[Node, None] = {}  # nodes with an unlocked snapshot, least recently read first

    @property
    def live(self) -> int:
        return len(self.owner)

    @property
    def evictable(self) -> int:
        return len(self._order)

    def put(self, node: Node, slot: int, clock: int) -> None:
        """The node's end has this state from now on; locked by nobody yet."""
        node.state = slot
        self.owner[slot] = node
        self.entered[slot] = clock
        self._order[node] = None
        if self.watch is not None:
            self.watch(node)

    def lock(self, slot: int) -> None:
        self.locks[slot] += 1
        self._order.pop(self.owner[slot], None)

    def unlock(self, slot: int) -> None:
        if self.locks[slot] <= 0:
            raise AssertionError(f"snapshot {slot} unlocked more often than locked")
        self.locks[slot] -= 1
        if not self.locks[slot]:
            self._order[self.owner[slot]] = None

    def leave(self, node: Node) -> None:
        """The node's snapshot, which nobody has locked, leaves the tree."""
        if node.state:
            del self._order[node]
            del self.owner[node.state]
            self.loose.append(node.state)
            node.state = 0

    def evict(self, count: int, tell: Callable[[int, Node, NDArray[np.intp]], None] | None) -> list[Node]:
        """Make up to `count` slots loose; `tell` hears of them before. Gives the nodes that lost theirs."""
        touched: list[Node] = []
        while count > 0 and self._order:
            node = next(iter(self._order))
            if tell is not None:
                tell(self.group, node, np.array([node.count - 1]))
            self.leave(node)
            touched.append(node)
            count -= 1
        return touched

    def taken_back(self, node: Node, mark: int) -> None:
        """A snapshot that came after the mark becomes loose."""
        if node.state and self.entered[node.state] > mark:
            self.leave(node)

    def clear(self) -> None:
        self.locks[:] = 0
        self.owner.clear()
        self.loose.clear()
        self._order.clear()

    def check(self, nodes: list[Node], locks: NDArray[np.int32]) -> None:
        """Verify the account against the tree and the locks that are known of, int32 [num_slots].

        Raises:
            AssertionError: saying what does not add up.
        """
        found = {node.state: node for node in nodes if node.state}
        if found != self.owner or self.loose:
            raise AssertionError(f"snapshots: {sorted(self.owner)} are in the tree, found {sorted(found)}")
        if (self.locks != locks).any():
            raise AssertionError(f"snapshots: locks are wrong of slots {np.flatnonzero(self.locks != locks).tolist()}")
        free = {node for slot, node in found.items() if not locks[slot]}
        if free != set(self._order):
            raise AssertionError("snapshots: what can be evicted is not what nobody has locked")
