"""Steps that did not happen: leases and tree go back to a mark.

A lease that launched something since the mark is put back exactly where it stood, as long as what it had is still its
own, or lies in the tree where it put it. It is not where the tree had an equal page, or where a lease read what
another one's undone step would have computed: such a lease goes on from the last border that the tree can give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from phloem.kvcache.node import NO_PAGES, Node

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kvcache.lease import Given, Lease, Turn
    from phloem.kvcache.manager import CacheManager


@dataclass(slots=True)
class _Return:
    """Where one lease goes: to `node`, which ends at page `depth`, and to the slots of state before `turn`."""

    lease: Lease
    node: Node
    depth: int
    limit: int
    exact: bool  # as it was; else as far as the tree can give
    turn: Turn | None


def roll_back(cache: CacheManager, mark: int, leases: Sequence[tuple[Lease, int]], given: Sequence[Given]) -> None:
    """Take everything out of the tree that entered it after the mark: its content was never computed.

    Args:
        cache: of which the steps were.
        mark: from `CacheManager.mark`.
        leases: every lease there is, with the number of leading pages that it may share with the tree afterwards.
        given: what leases held before each commit since the mark, in order. A lease is again what it was at the
            mark where all of that is still there; else it goes on from the last border that the tree can give, and
            has no page of its own (`Lease.held` says where).
    """
    gave: dict[int, list[Given]] = {}
    for item in given:
        gave.setdefault(id(item.lease), []).append(item)
    returns = [
        place
        for lease, limit in leases
        if cache.enabled and (place := _place(cache, mark, lease, limit, gave.get(id(lease), []))) is not None
    ]
    for place in returns:
        cache.tree.lock(place.node)
        _let_go(cache, mark, place)
    dropped = cache.tree.forget_since(mark)
    kept = [NO_PAGES]
    for place in returns:
        if place.exact:
            kept += _put_back(cache, place)
    cache.allocators[0].free(dropped[~np.isin(dropped, np.concatenate(kept))])
    cache.collect()
    for place in returns:
        if not place.exact:
            _go_on(cache, place)
    if not cache.enabled:
        for lease, _ in leases:
            _undo_turn(cache, mark, lease)


def _place(cache: CacheManager, mark: int, lease: Lease, limit: int, gave: list[Given]) -> _Return | None:
    """Where the lease goes; None where it may stay as it is."""
    turn = _first_turn(lease, mark)
    late = lease.node.created > mark or lease.shared > limit or _reads_since(cache, mark, lease, lease.shared)
    if not gave and turn is None and not late:
        return None
    start = gave[0].start if gave else lease.shared
    node, depth = lease.node, lease.shared
    while depth > start and node.parent is not None:
        depth -= node.count
        node = node.parent
    exact = (
        depth == start
        and node.created <= mark
        and start <= limit
        and not _reads_since(cache, mark, lease, start)
        and _still_there(cache, lease, start, gave)
    )
    if exact:
        return _Return(lease, node, depth, limit, True, turn)
    node, depth = lease.node, lease.shared
    while node.parent is not None and node.created > mark:
        depth -= node.count
        node = node.parent
    return _Return(lease, node, depth, limit, False, turn)


def _first_turn(lease: Lease, mark: int) -> Turn | None:
    return next((turn for turn in lease.turns or () if turn.at > mark), None)


def _reads_since(cache: CacheManager, mark: int, lease: Lease, start: int) -> bool:
    """Whether the lease reads, among its first `start` pages or as a state, what came into the tree after the mark."""
    for account in cache.windows:
        pages = lease.tables[account.group][lease.first[account.index] : start]
        if (account.entered[pages] > mark).any():
            return True
    if cache.states is None:
        return False
    turn = _first_turn(lease, mark)
    read, own = (turn.read, turn.own) if turn else (int(lease.tables[-1][0]), tuple(lease.own))
    return bool(read) and read not in own and bool(cache.states.entered[read] > mark)


def _still_there(cache: CacheManager, lease: Lease, start: int, gave: list[Given]) -> bool:
    """Whether the pages from `start` on that are in the tree now are those that the lease gave."""
    for number in range(cache.paged):
        first = lease.first[number - cache.paged] if cache.groups[number].window else 0
        mine = {item.start + at: page for item in gave for at, page in enumerate(item.pages[number].tolist())}
        row = lease.tables[number]
        if any(mine.get(at, 0) != row[at] for at in range(max(start, first), lease.shared)):
            return False
    return True


def _let_go(cache: CacheManager, mark: int, place: _Return) -> None:
    """Unlock what the lease has in the tree behind where it goes; where it goes is locked already."""
    lease = place.lease
    keep = place.depth if place.exact else 0
    for account in cache.windows:
        start = max(keep, lease.first[account.index])
        cache.unlock_window(lease, account, start, lease.shared)
    if cache.states is not None:
        late = [item for item in lease.snapshots if not place.exact or cache.states.entered[item[1]] > mark]
        for _, slot in late:
            cache.states.unlock(slot)
        lease.snapshots = [item for item in lease.snapshots if item not in late]
    cache.tree.unlock(lease.node)
    lease.node = place.node


def _put_back(cache: CacheManager, place: _Return) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """Pages from `place.depth` on, and slots, are the lease's own again; gives the pages of the tree's own group."""
    lease = place.lease
    kept = [NO_PAGES]
    for number in range(cache.paged):
        account = cache.windows[number - cache.paged] if cache.groups[number].window else None
        first = lease.first[account.index] if account is not None else 0
        back = lease.tables[number][max(place.depth, first) : lease.shared].copy()
        cache.own[number] += len(back)
        if account is None:
            kept.append(back)
        else:
            account.loose = [loose[~np.isin(loose, back)] for loose in account.loose]
    lease.shared = place.depth
    _undo_turn(cache, place.turn.at - 1 if place.turn else None, lease)
    return kept


def _undo_turn(cache: CacheManager, mark: int | None, lease: Lease) -> None:
    """Slots of state as they were before the first turn after the mark."""
    turn = _first_turn(lease, mark) if mark is not None else None
    if turn is None or lease.turns is None:
        return
    back = [slot for slot in turn.own if slot not in lease.own]
    cache.free_slots(lease, [slot for slot in lease.own if slot not in turn.own])
    if cache.states is not None:
        cache.states.loose = [slot for slot in cache.states.loose if slot not in back]
    cache.own[-1] += len(back)
    lease.own, lease.border = list(turn.own), turn.border
    lease.tables[-1][:] = turn.read, turn.write
    while lease.turns and lease.turns[-1].at >= turn.at:
        lease.turns.pop()


def _go_on(cache: CacheManager, place: _Return) -> None:
    """The lease goes on from the last border on its path that all groups can give, with no pages of its own."""
    lease, own = place.lease, place.lease.own
    cache.free_own(lease)
    locked = lease.node
    lease.empty()
    node, depth = cache.tree.take_above(locked, place.depth, place.limit)
    cache.tree.unlock(locked)
    cache.seat(lease, node, depth)
    lease.own = own
    if own:
        lease.tables[-1][1] = own[0]
    cache.tree.prune(locked)
