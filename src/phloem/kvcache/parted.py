"""The caches of several groups of ranks as one: each group has pages and a prefix tree of its own.

A lease is of one part (`Lease.part`), chosen when it is matched, and everything that is done to it is done there. Sums
stand for the whole where numbers are told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.kvcache.manager import CacheManager

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from phloem.kvcache.lease import Given, Lease
    from phloem.kvcache.radix import Found


class PartedCache(CacheManager):
    """`parts` are alike. What all of them know of themselves this has too (groups, page size), and nothing that
    changes: pages, a tree and accounts are a part's own, and what asks the whole for them fails."""

    def __init__(self, parts: list[CacheManager]) -> None:
        first = parts[0]
        self.groups, self.page_size, self.enabled = first.groups, first.page_size, first.enabled
        self.paged, self.gives_back, self.has_states = first.paged, first.gives_back, first.has_states
        self._chunk = first._chunk
        self.number, self.parts = 0, tuple(parts)
        for number, part in enumerate(parts):
            part.number = number

    @property
    def total_pages(self) -> int:
        return sum(part.total_pages for part in self.parts)

    @property
    def most_pages(self) -> int:
        return self.parts[0].total_pages

    @property
    def free_pages(self) -> int:
        return sum(part.free_pages for part in self.parts)

    @property
    def held_pages(self) -> int:
        return sum(part.held_pages for part in self.parts)

    @property
    def evicted_pages(self) -> int:
        return sum(part.evicted_pages for part in self.parts)

    @property
    def available_pages(self) -> int:
        return sum(part.available_pages for part in self.parts)

    @property
    def version(self) -> int:
        return sum(part.version for part in self.parts)

    def probe(self, namespace: str, tokens: NDArray[np.int32], limit: int) -> Found:
        """Of the part that has most."""
        return max((part.probe(namespace, tokens, limit) for part in self.parts), key=lambda found: found.num_pages)

    def reserve(self, lease: Lease, tokens: int) -> bool:
        return self.parts[lease.part].reserve(lease, tokens)

    def reserve_one_each(self, leases: list[Lease]) -> bool:
        each = [[lease for lease in leases if lease.part == part.number] for part in self.parts]
        pairs = [(part, own) for part, own in zip(self.parts, each, strict=True) if own]
        if not all(part.has_one_each(len(own)) for part, own in pairs):
            return False
        return all(part.reserve_one_each(own) for part, own in pairs)

    def turn(self, lease: Lease, end: int) -> None:
        self.parts[lease.part].turn(lease, end)

    def given(self, lease: Lease) -> Given:
        return self.parts[lease.part].given(lease)

    def commit(self, lease: Lease, tokens: NDArray[np.int32], computed: int) -> None:
        self.parts[lease.part].commit(lease, tokens, computed)

    def behind(self, lease: Lease, computed: int) -> None:
        self.parts[lease.part].behind(lease, computed)

    def release(self, lease: Lease, tokens: NDArray[np.int32], computed: int, keep: bool = True) -> None:
        self.parts[lease.part].release(lease, tokens, computed, keep)

    def cut(self, lease: Lease, known: NDArray[np.int32], start: int, count: int) -> int:
        return self.parts[lease.part].cut(lease, known, start, count)

    def mark(self) -> int:
        """One moment of all parts, whose clocks go on from the latest."""
        moment = max(part.mark() for part in self.parts)
        for part in self.parts:
            part.tree.wait_until(moment)
        return moment

    def reset(self, leases: Iterable[Lease] = ()) -> None:
        leases = list(leases)
        for part in self.parts:
            part.reset([lease for lease in leases if lease.part == part.number])

    def cached(self, number: int) -> int:
        return sum(part.cached(number) for part in self.parts)

    def evictable(self, number: int) -> int:
        return sum(part.evictable(number) for part in self.parts)
