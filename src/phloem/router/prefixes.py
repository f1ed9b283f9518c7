"""Which workers know how much of a prompt: a map from the hash of a prefix to a set of workers, as bits.

A prompt is a chain of hashes, each of which stands for everything before it. Matching walks the chain until no worker
is left, so that it costs what is known of the prompt and not how many workers there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def match(known: Mapping[int, int], chain: Sequence[int], alive: int) -> dict[int, int]:
    """Bit -> how many links of the chain that worker knows; those that know none are left out.

    `known`: the bits of those that know a link; `alive`: the bits of those that are asked about.
    """
    found: dict[int, int] = {}
    for depth, link in enumerate(chain):
        still = alive & known.get(link, 0)
        if still != alive:
            _note(found, alive & ~still, depth)
            alive = still
            if not alive:
                return found
    _note(found, alive, len(chain))
    return found


class Prefixes:
    """Keeps the `most` hashes that were used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._workers: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._workers)

    def match(self, chain: Sequence[int], alive: int) -> dict[int, int]:
        """As `match`, with what is remembered here."""
        return match(self._workers, chain, alive)

    def add(self, chain: Iterable[int], bit: int) -> None:
        """The worker has computed all of it; what was not used for longest is forgotten."""
        known, mark = self._workers, 1 << bit
        for link in chain:
            known[link] = known.pop(link, 0) | mark
        while len(known) > self._most:
            del known[next(iter(known))]

    def forget(self, bit: int) -> None:
        """The worker has gone, or has forgotten everything."""
        mark = 1 << bit
        self._workers = {link: left for link, bits in self._workers.items() if (left := bits & ~mark)}


def _note(found: dict[int, int], bits: int, depth: int) -> None:
    while bits and depth:
        low = bits & -bits
        found[low.bit_length() - 1] = depth
        bits ^= low
