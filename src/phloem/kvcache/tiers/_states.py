"""Recurrent states beyond the pool: rows of their own, behind those of the pages that they have taken in.

A state can be gone on from only where it was taken, so of a run of pages as many are of use as end at one. Its bytes
fill several rows, whose keys follow from that of the page at whose end it stands: it is there when all of them are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.kvcache.tiers._keys import state_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.kvcache.node import Node
    from phloem.kvcache.snapshots import Snapshots


class States:
    """`rows`: that a state fills. Without states (`rows` 0) every run is of use. `at_once`: each is to be written."""

    def __init__(self, snapshots: Snapshots | None, rows: int, at_once: bool) -> None:
        self.rows = rows if snapshots is not None else 0
        self._snapshots = snapshots
        self._records: list[tuple[Node, int]] = []  # that may have to be written, with their slots
        self._firsts: dict[str, tuple[list[bytes], list[bytes]]] = {}  # by request: pages' keys, and states' first ones
        if snapshots is not None and at_once:
            snapshots.watch = self.note

    def note(self, node: Node) -> None:
        """Its state is to be written, once it has been computed."""
        if self.rows and node.state:
            self._records.append((node, node.state))

    def due(self, horizon: int) -> list[Node]:
        """Nodes whose states have been computed by now, and that still have them."""
        if not self._records or self._snapshots is None:
            return []
        entered, records = self._snapshots.entered, self._records
        here = [(node, slot) for node, slot in records if node.state == slot]
        self._records = [(node, slot) for node, slot in here if entered[slot] > horizon]
        return [node for node, slot in here if entered[slot] <= horizon]

    @property
    def waiting(self) -> bool:
        return bool(self._records)

    def keys(self, key: bytes) -> list[bytes]:
        """Of the rows of the state behind this page."""
        return state_keys(key, self.rows)

    def usable(
        self, request_id: str, keys: Sequence[bytes], start: int, end: int, there: Callable[[Sequence[bytes]], int]
    ) -> int:
        """How far pages [start, end) are of use: to the last one with a state behind it. `there`: how many keys of a
        list, from the first on, can be had."""
        if not self.rows:
            return end
        firsts = self._first_keys(request_id, keys, end)
        for at in range(end, start, -1):
            if there(firsts[at - 1 : at]) and there(self.keys(keys[at - 1])) == self.rows:
                return at
        return start

    def _first_keys(self, request_id: str, keys: Sequence[bytes], count: int) -> list[bytes]:
        known, firsts = self._firsts.get(request_id, ([], []))
        if known[:1] != [*keys[:1]]:
            known, firsts = [*keys[:1]], []
            self._firsts[request_id] = known, firsts
        firsts += [state_keys(key, 1)[0] for key in keys[len(firsts) : count]]
        return firsts

    def forget(self, request_id: str) -> None:
        self._firsts.pop(request_id, None)

    def clear(self) -> None:
        self._records.clear()
