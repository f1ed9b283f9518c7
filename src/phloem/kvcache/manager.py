"""The only face of KV memory that the scheduler sees: match, reserve, commit, release, check.

Who owns which pages, when
--------------------------
Every page except page 0 (scratch of the pool) is at each moment in exactly one of three places:

* **free**: on the allocator's stack. Its content means nothing.
* **in the tree**: in one node of the radix tree, computed, whole, and never written again. Requests that read it hold
  a lock on the deepest node they use; while a node or anything below it is locked it cannot be evicted.
* **held**: by exactly one running request, which alone reads and writes it.

A running request's `Lease` lists its pages in order of position. `table[:shared]` are pages in the tree, protected by
the lock on `node`; `table[shared:held]` are its own.

    admission   match    locks a path; table[:shared] are the tree's pages                  free  ->  -
    each step   reserve  takes free pages (evicting unlocked ones first)                    free  ->  held
    at launch   commit   gives whole pages whose tokens are known to the tree, keeps a lock held  ->  in tree
                         (where the tree has an equal page already, the own copy is freed)  held  ->  free
    at the end  release  commits what is known and computed, unlocks, frees the rest        held  ->  free
    eviction    reserve  takes the pages of unlocked leaves                                 tree  ->  free
    a step that did not happen (no memory for it)
                roll_back  takes back what entered the tree since its launch                tree  ->  held or free

The runner executes steps in launch order, as a device stream does. Therefore pages change owner on the *launch* of
their last user, not on its end: a later launch that writes them runs after every earlier one that reads them; and a
page that a launched step will fill may be matched by the next plan already.

`free + in tree + held == total` holds between any two calls; `check` verifies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.kvcache.allocator import PageAllocator
from phloem.kvcache.radix import NO_PAGES, Found, Node, RadixCache

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from phloem.core.memory import Group

_DETACHED = Node(0, None, b"", NO_PAGES, 0)  # what a lease holds while the tree is switched off


class Lease:
    """The pages of one running request. `tables`: int32 [pages it can ever need]; see the module's docstring."""

    __slots__ = ("held", "namespace", "node", "shared", "tables")

    def __init__(self, namespace: str, tables: Sequence[NDArray[np.int32]]) -> None:
        self.namespace = namespace
        self.tables = tuple(tables)
        self.node = _DETACHED
        self.shared = 0
        self.held = 0

    @property
    def table(self) -> NDArray[np.int32]:
        return self.tables[0]


def namespace(salt: str, adapter: str = "", weight_version: str = "") -> str:
    """Requests share a prefix only where all three are the same."""
    return "\x1f".join((salt, adapter, weight_version)) if adapter or weight_version else salt


@dataclass(slots=True)
class Given:
    """Pages that a lease held just before a commit: `pages[i]` was its page number `start + i`."""

    lease: Lease
    start: int
    pages: NDArray[np.int32]


class CacheManager:
    """Pages 1..num_pages-1 of `page_size` tokens each, shared through a radix tree unless `enabled` is False."""

    def __init__(
        self,
        groups: Sequence[Group],
        num_pages: Sequence[int],
        page_size: int,
        enabled: bool = True,
        eviction: str = "lru",
    ) -> None:
        if len(groups) != 1 or groups[0].kind != "pages" or groups[0].window:
            raise ValueError(f"one group of full pages is all that can be kept, not {groups}")
        self.groups = tuple(groups)
        self.page_size = page_size
        self.enabled = enabled
        self.gives_back = self.has_states = False
        self.allocator = PageAllocator(num_pages[0])
        self.tree = RadixCache(page_size, eviction)
        self.evicted_pages = 0
        self._held = 0

    @property
    def total_pages(self) -> int:
        return self.allocator.usable

    @property
    def free_pages(self) -> int:
        return self.allocator.available

    @property
    def held_pages(self) -> int:
        return self._held

    @property
    def available_pages(self) -> int:
        """What `reserve` can get at most: free pages and those that eviction would free."""
        return self.allocator.available + self.tree.evictable_pages

    @property
    def version(self) -> int:
        """Changes whenever a `probe` may give another answer."""
        return self.tree.version

    def pages_for(self, tokens: int) -> int:
        """The most pages of the first group that a request of so many tokens holds at once."""
        return -(-tokens // self.page_size)

    def given(self, lease: Lease) -> Given:
        """What the lease holds now, for `roll_back`: taken before what a launch does to it."""
        return Given(lease, lease.shared, lease.table[lease.shared : lease.held].copy())

    def behind(self, lease: Lease, computed: int) -> None:
        """Give back what no token after `computed` ones reads."""

    def turn(self, lease: Lease) -> None:
        """A step of the lease was launched: the state that it writes is read next."""

    def cut(self, lease: Lease, known: NDArray[np.int32], start: int, count: int) -> int:
        """How many of `count` new tokens from `start` on a chunk had better have."""
        return count

    def probe(self, namespace: str, tokens: NDArray[np.int32], limit: int) -> Found:
        """How much of `tokens` is cached, looking at no more than `limit` tokens. Changes and locks nothing."""
        pages = self._match_pages(tokens, limit)
        if not self.enabled:
            return Found(0, None)
        return self.tree.find(namespace, tokens[: pages * self.page_size].tobytes(), pages)

    def match(
        self, namespace: str, tokens: NDArray[np.int32], limit: int, tables: Sequence[NDArray[np.int32]]
    ) -> Lease:
        """Lock the longest cached prefix of `tokens`, at most `limit` tokens, and put its pages into `tables`."""
        lease = Lease(namespace, tables)
        if self.enabled:
            pages = self._match_pages(tokens, limit)
            data = tokens[: pages * self.page_size].tobytes()
            lease.node, found = self.tree.take(namespace, data, pages)
            lease.shared = lease.held = len(found)
            lease.table[: len(found)] = found
        return lease

    def reserve(self, lease: Lease, tokens: int) -> bool:
        """Let the lease cover `tokens` positions. False, and nothing changes, when there are not enough pages."""
        missing = -(-tokens // self.page_size) - lease.held
        if missing <= 0:
            return True
        pages = self._allocate(missing)
        if pages is None:
            return False
        lease.table[lease.held : lease.held + missing] = pages
        lease.held += missing
        return True

    def reserve_one_each(self, leases: list[Lease]) -> bool:
        """One more page for each of these: a decode step's rows at a page border. All or nothing."""
        pages = self._allocate(len(leases))
        if pages is None:
            return False
        for lease, page in zip(leases, pages.tolist(), strict=True):
            lease.table[lease.held] = page
            lease.held += 1
        return True

    def commit(self, lease: Lease, tokens: NDArray[np.int32], computed: int) -> None:
        """Give the tree every whole page among the first `computed` positions; `tokens` are the known ids."""
        full = min(computed, len(tokens)) // self.page_size
        if not self.enabled or full <= lease.shared:
            return
        start = lease.shared
        own = lease.table[start:full]
        data = tokens[start * self.page_size : full * self.page_size].tobytes()
        lease.node, kept = self.tree.extend(lease.node, data, own)
        self._held -= full - start
        twice = own != kept
        if twice.any():
            self.allocator.free(own[twice])
            lease.table[start:full] = kept
        lease.shared = full

    def release(self, lease: Lease, tokens: NDArray[np.int32], computed: int, keep: bool = True) -> None:
        """End a lease. With `keep` its whole known pages go to the tree; without, its branch is dropped as well.

        `keep=False` is for a request that failed: what it computed may be wrong.
        """
        if keep:
            self.commit(lease, tokens, computed)
        own = lease.table[lease.shared : lease.held]
        self._held -= len(own)
        self.allocator.free(own)
        if self.enabled:
            self.tree.unlock(lease.node)
            if not keep:
                self.allocator.free(self.tree.forget(lease.node))
        lease.table[: lease.held] = 0
        lease.held = lease.shared = 0
        lease.node = _DETACHED

    def mark(self) -> int:
        """A moment to which `roll_back` can return. Taken before the commits of a launched step."""
        return self.tree.mark()

    def roll_back(self, mark: int, leases: Sequence[tuple[Lease, int]], given: Sequence[Given]) -> None:
        """Take everything out of the tree that entered it after the mark: its content was never computed.

        Args:
            mark: from `mark`.
            leases: every lease there is, with the number of leading pages that it may share with the tree afterwards.
            given: what leases held before each commit since the mark, in order. A lease gets its own pages back where
                they are still there; at the first one that is not, it ends (`Lease.held` says where).
        """
        moved: list[tuple[Lease, int]] = []
        for lease, limit in leases:
            node, depth = self.tree.ancestor_before(lease.node, mark, limit)
            if node is not lease.node:
                moved.append((lease, lease.shared))
                self.tree.lock(node)
                self.tree.unlock(lease.node)
                lease.node, lease.shared = node, depth
        dropped = set(self.tree.forget_since(mark).tolist())
        for lease, was in moved:
            mine = {item.start + i: page for item in given if item.lease is lease for i, page in enumerate(item.pages)}
            at = lease.shared
            while at < was and (page := int(mine.get(at, 0))) in dropped:
                dropped.remove(page)
                lease.table[at] = page
                at += 1
            self._held += at - lease.shared
            if at < was:
                own = lease.table[was : lease.held].copy()
                self._held -= len(own)
                self.allocator.free(own)
                lease.table[at : lease.held] = 0
                lease.held = at
        self.allocator.free(np.array(sorted(dropped), dtype=np.int32))

    def reset(self, leases: Iterable[Lease] = ()) -> None:
        """Forget every page and every lease (pass those in use: they are emptied)."""
        for lease in leases:
            lease.table[: lease.held] = 0
            lease.held = lease.shared = 0
            lease.node = _DETACHED
        self.tree.clear()
        self.allocator.reset()
        self._held = 0

    def check(self, leases: Iterable[Lease]) -> None:
        """Verify that each page is in exactly one place.

        Raises:
            AssertionError: saying which account does not add up.
        """
        free, in_tree, total = self.allocator.available, self.tree.pages, self.allocator.usable
        if free + in_tree + self._held != total:
            raise AssertionError(f"free {free} + in tree {in_tree} + held {self._held} != total {total}")
        leases = list(leases)
        own = [lease.table[lease.shared : lease.held] for lease in leases]
        nodes = list(self.tree.nodes())
        places = [self.allocator.free_pages(), *own, *(node.pages for node in nodes)]
        count = np.bincount(np.concatenate(places), minlength=self.allocator.num_pages)
        if count[0] or (count[1:] != 1).any():
            wrong = np.flatnonzero(count != 1)[:8].tolist()
            raise AssertionError(f"pages in no place or in several: {wrong} (page 0 must be in none)")
        held = sum(len(pages) for pages in own)
        evictable = sum(len(node.pages) for node in nodes if not node.lock)
        if held != self._held or evictable != self.tree.evictable_pages:
            raise AssertionError(
                f"held {self._held}, counted {held}; evictable {self.tree.evictable_pages}, counted {evictable}"
            )
        self._check_locks(nodes, leases)

    def _check_locks(self, nodes: list[Node], leases: list[Lease]) -> None:
        direct: dict[int, int] = {}
        for lease in leases:
            direct[lease.node.uid] = direct.get(lease.node.uid, 0) + 1
        for node in nodes:
            locks = direct.get(node.uid, 0) + sum(child.lock > 0 for child in node.children.values())
            if node.lock != locks:
                raise AssertionError(f"node {node.uid} has lock {node.lock}, but {locks} hold it")

    def snapshot(self, max_nodes: int = 512) -> dict[str, Any]:
        """The tree for a live view: totals in tokens and at most `max_nodes` nodes, parents first."""
        size = self.page_size
        return {
            "enabled": self.enabled,
            "page_size": size,
            "total_tokens": self.total_pages * size,
            "free_tokens": self.free_pages * size,
            "held_tokens": self._held * size,
            "cached_tokens": self.tree.pages * size,
            "evictable_tokens": self.tree.evictable_pages * size,
            "evicted_tokens": self.evicted_pages * size,
            "num_nodes": self.tree.num_nodes,
            "nodes": self.tree.snapshot(max_nodes),
        }

    def _match_pages(self, tokens: NDArray[np.int32], limit: int) -> int:
        return max(0, min(limit, len(tokens))) // self.page_size

    def _allocate(self, count: int) -> NDArray[np.int32] | None:
        short = count - self.allocator.available
        if short > 0:
            if short > self.tree.evictable_pages:
                return None
            evicted = self.tree.evict(short)
            self.evicted_pages += len(evicted)
            self.allocator.free(evicted)
        pages = self.allocator.allocate(count)
        if pages is not None:
            self._held += count
        return pages
