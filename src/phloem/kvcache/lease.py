"""What one running request has of each group of memory; see `manager.py` for who owns what when."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from phloem.kvcache.node import NO_PAGES, Node

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DETACHED = Node(0, None, b"", 0, NO_PAGES, 0)  # what a lease holds while the tree is switched off
SLOTS = 2  # of state, that each running request writes in turn
NO_BORDER: tuple[int, int] = (0, 0)
TURNS = 64  # steps of a request that can be undone at most; far more than are ever in flight

# Of leases that have no such group: nobody changes these, and a lease is made for every request.
_NO_WINDOWS: list[int] = []
_NO_SLOTS: list[int] = []
_NO_SNAPSHOTS: list[tuple[int, int]] = []


class Turn(NamedTuple):
    """The slots of state before a step was launched."""

    at: int  # when, in ticks of the tree
    read: int
    write: int
    own: tuple[int, ...]
    border: tuple[int, int]


class Lease:
    """The memory of one running request.

    `tables`: a row for each group, int32; of pages by position, of states [slot to read, slot to write].
    `shared` and `held` count pages of positions, alike for all groups of pages: the first `shared` are in the tree,
    the others up to `held` are the request's own. `first`: for each group with a window the first page that it still
    has; entries before it are 0. `own`: its own slots of state. `snapshots`: (page where it ends, slot) of those in
    the tree that it has locked. `border`: (page where it ends, slot) of its own state at the last page border that a
    step ended at, in a third slot, for the tree.
    """

    __slots__ = (
        "border",
        "first",
        "held",
        "namespace",
        "node",
        "own",
        "part",
        "shared",
        "snapshots",
        "tables",
        "turns",
    )

    def __init__(self, namespace: str, tables: tuple[NDArray[np.int32], ...], windows: int, states: bool) -> None:
        self.namespace = namespace
        self.part = 0  # of several caches (`parted.py`): whose it is
        self.tables = tables
        self.node = DETACHED
        self.shared = 0
        self.held = 0
        self.first = [0] * windows if windows else _NO_WINDOWS
        self.own: list[int] = [] if states else _NO_SLOTS
        self.snapshots: list[tuple[int, int]] = [] if states else _NO_SNAPSHOTS
        self.border: tuple[int, int] = NO_BORDER
        self.turns: deque[Turn] | None = deque(maxlen=TURNS) if states else None

    def empty(self) -> None:
        """It has nothing any more."""
        for table in self.tables:
            table[: self.held] = 0
        self.held = self.shared = 0
        self.node = DETACHED
        if self.first:
            self.first = [0] * len(self.first)
        if self.turns is not None:
            self.tables[-1][:] = 0
            self.turns.clear()
            self.own, self.snapshots, self.border = [], [], NO_BORDER


@dataclass(slots=True, eq=False)
class Given:
    """Pages that a lease held just before a commit: `pages[g][i]` was its page number `start + i` in group g."""

    lease: Lease
    start: int
    pages: tuple[NDArray[np.int32], ...]


@dataclass(slots=True, eq=False)
class Hold:
    """A lock for somebody who is no request: a copy under way. All that is left at the end of a node, and before it."""

    node: Node
    windows: list[NDArray[np.int32]]  # pages locked in each group with a window
    state: int  # 0: none
