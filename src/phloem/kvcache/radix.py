"""A radix tree over whole KV pages: which computed prefixes exist, and where each group of memory keeps them.

An edge holds the token ids of one or more pages as bytes, so that a whole edge is compared by one memcmp; children are
found by the bytes of their first page. Each namespace has a root of its own. Only leaves are evicted.

The tree itself accounts for the pages of the group that keeps everything. A node's `lock` counts the requests that hold
it directly plus its locked children. Locking therefore walks up only to the first ancestor that is locked already, and
`evictable_pages` is exact at every moment. Pages of windows and snapshots of state hang on the nodes and have accounts
of their own (`windows.py`, `snapshots.py`): they can go before their node does, and go with it at the latest. Where
some are gone a prefix ends at a border that all groups can still give (`border`).
The idea of sharing prefixes in a tree with LRU leaves is from RadixAttention (Zheng et al., SGLang, 2023).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from phloem.kvcache.node import NO_PAGES, NO_WINDOWS, TOKEN_BYTES, Node, hashes, path_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from phloem.kvcache.snapshots import Snapshots
    from phloem.kvcache.windows import WindowPages

    Listener = Callable[[int, list[tuple[bytes, int]]], None]


class Watch(Protocol):
    """Hears of every page of the tree, also of those that leave it because their step never happened."""

    def added(self, node: Node) -> None: ...
    def removed(self, node: Node, left: int) -> None: ...
    def cleared(self) -> None: ...


@dataclass(slots=True)
class Found:
    """A prefix that all groups can give: `node` ends exactly after `num_pages`; None when the prefix ends in an edge.

    `known` pages of it are in the tree, of which some groups may have lost what a request needs to go on from there.
    """

    num_pages: int
    node: Node | None
    known: int = 0


def _lru(node: Node) -> tuple[int, int]:
    return node.stamp, 0


def _lfu(node: Node) -> tuple[int, int]:
    return node.hits, node.stamp


def _fifo(node: Node) -> tuple[int, int]:
    return node.created, 0


RANKS: dict[str, Callable[[Node], tuple[int, int]]] = {"lru": _lru, "lfu": _lfu, "fifo": _fifo}


class RadixCache:
    """The tree. It knows page ids but owns no free list: who drops pages gets them back as arrays.

    `whole`: the model has a group that keeps everything; else `Node.pages` are empty. Pages of windows and slots of
    state that a call drops lie in `loose` of their accounts afterwards.
    """

    def __init__(
        self,
        page_size: int,
        eviction: str = "lru",
        windows: Sequence[WindowPages] = (),
        states: Snapshots | None = None,
        whole: bool = True,
    ) -> None:
        if eviction not in RANKS:
            raise ValueError(f"unknown eviction {eviction!r}; known: {', '.join(sorted(RANKS))}")
        self.page_size = page_size
        self.windows, self.states, self.whole = tuple(windows), states, whole
        self.plain = whole and not windows and states is None  # nothing hangs on the nodes but their pages
        self.on_evict: Listener | None = None  # hears (group, [(hash of the prefix, page)]) before they go
        self.watch: Watch | None = None
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

    def tick(self) -> int:
        """The next moment."""
        self._clock += 1
        return self._clock

    def wait_until(self, moment: int) -> None:
        """No earlier than this moment."""
        self._clock = max(self._clock, moment)

    @property
    def clock(self) -> int:
        return self._clock

    # looking

    def find(self, namespace: str, data: bytes, limit: int) -> Found:
        """The longest prefix of `data` (whole pages, at most `limit` pages) that all groups have. Changes nothing."""
        node = self._roots.get(namespace)
        if node is None:
            return Found(0, None)
        if not self.plain:
            path, known = self.walk(node, data, limit)
            depth = self.border(path, known)
            return Found(depth, _ending_at(node, path, depth), known)
        size, done = self._page_bytes, 0
        while done < limit:
            child = node.children.get(data[done * size : (done + 1) * size])
            if child is None:
                break
            same = self._common(child, data, done, limit)
            done += same
            if same < child.count:
                return Found(done, None, done)
            node = child
        return Found(done, node, done)

    def walk(self, node: Node, data: bytes, limit: int) -> tuple[list[Node], int]:
        """The nodes below `node` that hold the prefix of `data`, the last perhaps in part, and its pages."""
        size, done = self._page_bytes, 0
        path: list[Node] = []
        while done < limit:
            child = node.children.get(data[done * size : (done + 1) * size])
            if child is None:
                break
            same = self._common(child, data, done, limit)
            path.append(child)
            done += same
            if same < child.count:
                break
            node = child
        return path, done

    def border(self, path: Sequence[Node], depth: int) -> int:
        """The last page border, at most `depth`, from which a request can go on: nothing it reads is lost.

        `path` begins below a root and covers `depth` pages.
        """
        fits: NDArray[np.bool_] | None = None  # [depth]: whether one can go on from the end of page i
        for account in self.windows:
            live = np.concatenate([NO_PAGES, *(node.windows[account.index] for node in path)])[:depth] != 0
            if account.reach == 0 or live.all():
                continue
            at = np.arange(depth)
            run = at - np.maximum.accumulate(np.where(live, -1, at))
            good = run >= np.minimum(at + 1, account.reach)
            fits = good if fits is None else fits & good
        if self.states is None:
            if fits is None:
                return depth
            ends = np.flatnonzero(fits)
            return int(ends[-1]) + 1 if len(ends) else 0
        end = sum(node.count for node in path)
        for node in reversed(path):
            if end <= depth and node.state and (fits is None or fits[end - 1]):
                return end
            end -= node.count
        return 0

    def take(self, namespace: str, data: bytes, limit: int) -> tuple[Node, NDArray[np.int32]]:
        """Match as `find` does, split where the match ends, count the hit and lock the node; gives node and pages.

        Pages of windows and states are not locked by this.
        """
        self._clock += 1
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = self._new(None, b"", 0, NO_PAGES)
            node.name = namespace
        if not self.plain:
            limit = self.border(*self.walk(node, data, limit))
        size, done = self._page_bytes, 0
        found: list[NDArray[np.int32]] = []
        while done < limit:
            child = node.children.get(data[done * size : (done + 1) * size])
            if child is None:
                break
            same = self._common(child, data, done, limit)
            node = child if same == child.count else self._split(child, same)
            node.stamp = self._clock
            node.hits += 1
            found.append(node.pages)
            done += same
        self.lock(node)
        if not found:
            return node, NO_PAGES
        return node, found[0] if len(found) == 1 else np.concatenate(found)

    def take_above(self, node: Node, depth: int, limit: int) -> tuple[Node, int]:
        """Lock the path to `node`, which ends at page `depth`, as far as all groups can give it, within `limit` pages.

        Gives the node locked and where it ends.
        """
        path = path_to(node)
        root = path[0].parent if path else node
        assert root is not None
        if not self.plain:
            limit = self.border(path, min(depth, limit))
        at, end = root, 0
        for step in path:
            if end + step.count > limit:
                if not self.plain and limit > end:
                    at, end = self._split(step, limit - end), limit
                break
            at, end = step, end + step.count
        self._roots.setdefault(root.name, root)
        self.lock(at)
        return at, end

    def _common(self, child: Node, data: bytes, done: int, limit: int) -> int:
        """How many leading pages of the edge equal `data` from page `done` on; the first is known to."""
        size = self._page_bytes
        count = child.count
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
            self.evictable_pages -= at.count
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
            self.evictable_pages += at.count
            parent = at.parent
            if not at.children:
                self._offer(at)
            at = parent

    # growing

    def extend(
        self,
        node: Node,
        data: bytes,
        pages: NDArray[np.int32],
        windows: Sequence[NDArray[np.int32]] = NO_WINDOWS,
    ) -> tuple[Node, NDArray[np.int32], list[NDArray[np.int32]]]:
        """Put pages with token ids `data` under a node that the caller has locked.

        Args:
            node: where they begin.
            data: token ids as int32 bytes.
            pages: of the group that keeps everything, int32 [n]; empty where there is none.
            windows: of each group with a window, int32 [n], 0 where the caller has none. They become what the tree has.

        Returns:
            The node where they end, which holds the caller's lock instead of the old one; for each page the one that
            the tree has: where it differs, the tree had it already, and the caller frees its own; and for each group
            with a window the pages that the caller frees.
        """
        self._clock += 1
        size, done, count = self._page_bytes, 0, len(data) // self._page_bytes
        kept = pages.copy()
        twice: list[list[NDArray[np.int32]]] = [[] for _ in windows] if windows else []
        at = node
        while done < count:
            child = at.children.get(data[done * size : (done + 1) * size])
            if child is None:
                own = [pages[done:].copy() for pages in windows] if windows else NO_WINDOWS
                at = self._add(at, data[done * size :], kept[done:].copy(), own)
                break
            same = self._common(child, data, done, count)
            at = child if same == child.count else self._split(child, same)
            at.stamp = self._clock
            if self.whole:
                kept[done : done + same] = at.pages
            if windows:
                self._merge(at, [pages[done : done + same] for pages in windows], twice)
            done += same
        if at is not node:
            self.lock(at)
            node.lock -= 1  # still locked through its child
        return at, kept, [np.concatenate([NO_PAGES, *freed]) for freed in twice] if twice else []

    def _merge(
        self, node: Node, windows: Sequence[NDArray[np.int32]], twice: Sequence[list[NDArray[np.int32]]]
    ) -> None:
        """Give a node what its windows lack; what it had already is added to `twice`."""
        self.version += 1
        for account, own, freed in zip(self.windows, windows, twice, strict=True):
            freed.append(account.merge(node, own, self._clock))

    def put_state(self, node: Node, slot: int) -> None:
        """The end of the node, which has none yet, has this state."""
        assert self.states is not None and node.parent is not None and not node.state
        self.states.put(node, slot, self.tick())
        self.version += 1

    def _add(self, parent: Node, data: bytes, pages: NDArray[np.int32], windows: Sequence[NDArray[np.int32]]) -> Node:
        count = len(data) // self._page_bytes
        node = self._new(parent, data, count, pages, windows)
        parent.children[data[: self._page_bytes]] = node
        self.pages += count
        self.evictable_pages += count
        self.num_nodes += 1
        self.version += 1
        if windows:
            for account, own in zip(self.windows, windows, strict=True):
                account.enter(own, self._clock)
                account.reshaped(node)
                account.reshaped(parent)
        if self.watch is not None:
            self.watch.added(node)
        return node

    def _new(
        self,
        parent: Node | None,
        data: bytes,
        count: int,
        pages: NDArray[np.int32],
        windows: Sequence[NDArray[np.int32]] = NO_WINDOWS,
    ) -> Node:
        self._uids += 1
        return Node(self._uids, parent, data, count, pages, self._clock, windows)

    def _split(self, node: Node, count: int) -> Node:
        """Cut an edge after `count` pages; the upper part is new, the lower part stays the node that others hold."""
        parent = node.parent
        assert parent is not None and 0 < count < node.count
        size = self._page_bytes
        above = [pages[:count] for pages in node.windows] if self.windows else NO_WINDOWS
        upper = self._new(parent, node.data[: count * size], count, node.pages[:count], above)
        upper.stamp, upper.hits, upper.created = node.stamp, node.hits, node.created
        upper.lock = 1 if node.lock else 0
        if node.chain:
            upper.chain, node.chain = node.chain[:count], node.chain[count:]
        parent.children[upper.data[:size]] = upper
        node.data, node.pages, node.parent = node.data[count * size :], node.pages[count:], upper
        node.count -= count
        if self.windows:
            node.windows = [pages[count:] for pages in node.windows]
        upper.children[node.data[:size]] = node
        self.num_nodes += 1
        for account in self.windows:
            account.reshaped(upper)
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
            goes = min(count, node.count)
            if self.on_evict is not None:
                self._tell_all(node, node.count - goes)
            freed.append(self._shorten(node, goes))
            count -= goes
        return np.concatenate(freed) if freed else NO_PAGES

    def evict_from(self, account: WindowPages | Snapshots, count: int) -> None:
        """Make up to `count` pages or slots of one group loose, which others do not need."""
        self.version += 1
        for node in account.evict(count, self._tell if self.on_evict is not None else None):
            self.prune(node)

    def prune(self, node: Node) -> None:
        """Drop a branch from its end as far as nobody needs it and no group keeps anything of it."""
        while not self.whole and (parent := node.parent) is not None and not node.lock and not node.children:
            if not node.bare:
                return
            self._shorten(node, node.count)
            node = parent

    def forget(self, node: Node) -> NDArray[np.int32]:
        """Drop an unlocked branch from its end up to the first node that others need; gives the pages."""
        freed: list[NDArray[np.int32]] = []
        while (parent := node.parent) is not None and not node.lock and not node.children:
            freed.append(self._shorten(node, node.count))
            node = parent
        return np.concatenate(freed) if freed else NO_PAGES

    def forget_since(self, mark: int) -> NDArray[np.int32]:
        """Drop all that came after the mark: none of it may be locked. Gives the pages."""
        nodes = list(self.nodes())
        freed: list[NDArray[np.int32]] = []
        for node in reversed(nodes):  # nothing old hangs below something new: children come first here
            if node.created > mark:
                if node.lock or node.children:
                    raise AssertionError(f"node {node.uid} is in use and cannot be forgotten")
                freed.append(self._shorten(node, node.count))
                continue
            for account in self.windows:
                account.taken_back(node, mark)
            if self.states is not None:
                self.states.taken_back(node, mark)
            self.prune(node)
        self.version += 1
        return np.concatenate(freed) if freed else NO_PAGES

    def clear(self) -> None:
        """Forget everything, locks included: for a reset in which no request holds anything any more."""
        if self.watch is not None:
            self.watch.cleared()
        for node in list(self.nodes()):
            node.parent = None
        self._roots.clear()
        self._heap.clear()
        self.pages = self.evictable_pages = self.num_nodes = 0
        self.version += 1
        for account in self.windows:
            account.clear()
        if self.states is not None:
            self.states.clear()

    def _shorten(self, node: Node, count: int) -> NDArray[np.int32]:
        left = node.count - count
        if self.watch is not None:
            self.watch.removed(node, left)
        freed = node.pages[left:]
        self.pages -= count
        self.evictable_pages -= count
        self.version += 1
        plain = self.plain
        if not plain:
            self._let_go(node, left)
        if left:
            node.data, node.pages, node.count = node.data[: left * self._page_bytes], node.pages[:left].copy(), left
            if node.chain:
                node.chain = node.chain[:left]
            for account in self.windows:
                account.reshaped(node)
            self._offer(node)
            return freed
        parent = node.parent
        assert parent is not None
        del parent.children[node.data[: self._page_bytes]]
        node.parent = None
        self.num_nodes -= 1
        if not plain:
            for account in self.windows:
                account.reshaped(parent)
        if not parent.children and not parent.lock:
            self._offer(parent)
        return freed

    def _let_go(self, node: Node, left: int) -> None:
        """What hangs on the node behind its first `left` pages leaves the tree with them."""
        if self.states is not None:
            self.states.leave(node)
        for account in self.windows:
            account.leave(node, left)
        node.windows = [pages[:left].copy() for pages in node.windows]

    def _offer(self, node: Node) -> None:
        """An unlocked leaf may be evicted; a root without children has no use at all."""
        if node.parent is None:
            self._roots.pop(node.name, None)
            return
        if not node.queued and self.whole:
            node.queued = True
            heapq.heappush(self._heap, (self._rank(node), node.uid, node))

    def _tell(self, group: int, node: Node, at: NDArray[np.intp]) -> None:
        """Say which pages, or which state, of the node are about to go."""
        if self.on_evict is None or not len(at):
            return
        chain = hashes(node)
        if self.states is not None and group == self.states.group:
            self.on_evict(group, [(chain[-1], node.state)])
            return
        index = group - 1 if self.whole else group
        pages = node.pages if self.whole and group == 0 else node.windows[index]
        self.on_evict(group, [(chain[i], int(pages[i])) for i in at.tolist()])

    def _tell_all(self, node: Node, start: int) -> None:
        """The node's pages from `start` on are about to go, with what hangs on them."""
        self._tell(0, node, np.arange(start, node.count))
        for account in self.windows:
            self._tell(account.group, node, np.flatnonzero(node.windows[account.index][start:]) + start)
        if self.states is not None and node.state:
            self._tell(self.states.group, node, np.array([node.count - 1]))

    # everything

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first."""
        for _, _, node in self.everything():
            yield node

    def everything(self) -> Iterator[tuple[str, int, Node]]:
        """Every node but the roots, parents first, with its namespace and the page where it begins."""
        for name, root in self._roots.items():
            level = [(0, iter(root.children.values()))]
            while level:
                following: list[tuple[int, Iterator[Node]]] = []
                for depth, children in level:
                    for node in children:
                        yield name, depth, node
                        following.append((depth + node.count, iter(node.children.values())))
                level = following


def _ending_at(root: Node, path: Sequence[Node], depth: int) -> Node | None:
    at, end = root, 0
    for node in path:
        if end >= depth:
            break
        at, end = node, end + node.count
    return at if end == depth else None
