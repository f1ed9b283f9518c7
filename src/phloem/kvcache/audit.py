"""Whether the page-ownership table of `manager.py` is true: each page in one place, each lock somebody's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.kvcache.lease import Lease
    from phloem.kvcache.manager import CacheManager
    from phloem.kvcache.node import Node
    from phloem.kvcache.windows import WindowPages


def check(cache: CacheManager, leases: Sequence[Lease]) -> None:
    """Verify that in each group each page is in exactly one place, and that each lock is somebody's.

    Raises:
        AssertionError: saying which account does not add up.
    """
    nodes = list(cache.tree.nodes())
    for number in range(len(cache.groups)):
        _check_group(cache, number, leases, nodes)
    evictable = sum(node.count for node in nodes if not node.lock)
    pages = sum(node.count for node in nodes)
    if evictable != cache.tree.evictable_pages or pages != cache.tree.pages:
        raise AssertionError(
            f"evictable {cache.tree.evictable_pages} of {cache.tree.pages}, counted {evictable} of {pages}"
        )
    _check_nodes(cache, nodes)
    _check_locks(cache, nodes, leases)
    for account in cache.windows:
        account.check(nodes, _window_locks(cache, account, leases))
    if cache.states is not None:
        locks = np.zeros(len(cache.states.locks), dtype=np.int32)
        for slot in [slot for lease in leases for _, slot in lease.snapshots]:
            locks[slot] += 1
        for hold in cache.holds:
            locks[hold.state] += bool(hold.state)
        cache.states.check(nodes, locks)


def _check_group(cache: CacheManager, number: int, leases: Sequence[Lease], nodes: list[Node]) -> None:
    """In one group: free + in tree + held == total, page by page."""
    name = f"group {number} ({cache.groups[number].kind})"
    allocator = cache.allocators[number]
    free, in_tree, held, total = allocator.available, cache.cached(number), cache.own[number], allocator.usable
    if free + in_tree + held != total:
        raise AssertionError(f"{name}: free {free} + in tree {in_tree} + held {held} != total {total}")
    if number == cache.paged:
        own = [np.array(lease.own, dtype=np.int32) for lease in leases]
        for lease in leases:
            slot = lease.border[1]
            if slot and (slot not in lease.own or slot == lease.tables[-1][1]):
                raise AssertionError(f"{name}: slot {slot} is kept for the tree, but is written or not the lease's own")
        kept = [np.array([node.state for node in nodes if node.state], dtype=np.int32)]
    else:
        own = [_own_pages(cache, number, lease) for lease in leases]
        kept = [pages[pages != 0] for pages in map(_pages_in(cache, number), nodes)]
    count = np.bincount(np.concatenate([allocator.free_pages(), *own, *kept]), minlength=allocator.num_pages)
    if count[0] or (count[1:] != 1).any():
        wrong = np.flatnonzero(count != 1)[:8].tolist()
        raise AssertionError(f"{name}: pages in no place or in several: {wrong} (page 0 must be in none)")
    counted = sum(len(pages) for pages in own)
    if counted != held:
        raise AssertionError(f"{name}: held {held}, counted {counted}")


def _pages_in(cache: CacheManager, number: int) -> Callable[[Node], NDArray[np.int32]]:
    if not cache.groups[number].window:
        return lambda node: node.pages
    index = cache.windows[number - cache.paged].index
    return lambda node: node.windows[index]


def _own_pages(cache: CacheManager, number: int, lease: Lease) -> NDArray[np.int32]:
    """Own pages by the table, which must show the tree's pages before them and nothing before the window."""
    row = lease.tables[number]
    first = lease.first[number - cache.paged] if cache.groups[number].window else 0
    if row[: min(first, lease.held)].any() or not row[first : lease.held].all():
        raise AssertionError(f"group {number}: a lease's table is not 0 up to page {first}, or is 0 behind it")
    depth, node, pages_in = lease.shared, lease.node, _pages_in(cache, number)
    while node.parent is not None:
        start = depth - node.count
        if (row[max(start, first) : depth] != pages_in(node)[max(0, first - start) :]).any():
            raise AssertionError(f"group {number}: a lease's table is not what the tree has in node {node.uid}")
        depth, node = start, node.parent
    if cache.enabled and depth:
        raise AssertionError(f"a lease shares {lease.shared} pages, but its node ends elsewhere")
    return row[max(first, lease.shared) : lease.held]


def _check_nodes(cache: CacheManager, nodes: list[Node]) -> None:
    """Shapes, and that nothing useless is kept."""
    for node in nodes:
        sizes = {len(pages) for pages in node.windows} | ({len(node.pages)} if cache.tree.whole else set())
        if sizes - {node.count} or len(node.windows) != len(cache.windows):
            raise AssertionError(f"node {node.uid} has {node.count} pages, its groups {sorted(sizes)}")
        if node.bare and not node.lock and not node.children:
            raise AssertionError(f"node {node.uid} is kept for nothing")


def _check_locks(cache: CacheManager, nodes: list[Node], leases: Sequence[Lease]) -> None:
    direct: dict[int, int] = {}
    for node in [lease.node for lease in leases] + [hold.node for hold in cache.holds]:
        direct[node.uid] = direct.get(node.uid, 0) + 1
    for node in nodes:
        locks = direct.get(node.uid, 0) + sum(child.lock > 0 for child in node.children.values())
        if node.lock != locks:
            raise AssertionError(f"node {node.uid} has lock {node.lock}, but {locks} hold it")


def _window_locks(cache: CacheManager, account: WindowPages, leases: Sequence[Lease]) -> NDArray[np.int32]:
    locks = np.zeros(len(account.locks), dtype=np.int32)
    for lease in leases:
        locks[lease.tables[account.group][lease.first[account.index] : lease.shared]] += 1
    for hold in cache.holds:
        locks[hold.windows[account.index]] += 1
    return locks
