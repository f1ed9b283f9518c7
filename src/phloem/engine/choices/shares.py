"""How memory is divided among the groups of a model: pages that keep everything, windows, states.

The first group is the pool that settings and reports speak of. The others get what running requests need of them at
most, so that they are never what a request waits for, and a share for what is cached. So the bytes of all groups are
a fixed part and one that grows with the tokens of the first group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.resolve import GIB, Decision
from phloem.kvcache.lease import SLOTS
from phloem.kvcache.pool import KVPool

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch

    from phloem.core.memory import Group, MemorySpec

CACHED_WINDOWS = 4  # a cached window page for so many pages of the first group
SNAPSHOT_SHARE = 4  # snapshots beyond those that running requests read take one part of so many of the other memory
READ_STATES = SLOTS + 1  # of each running request: those that it writes in turn, and the one that it reads or keeps


@dataclass(frozen=True, slots=True)
class Load:
    """What runs at most."""

    running: int
    chunk: int  # tokens of a step
    context: int


@dataclass(frozen=True, slots=True)
class Shares:
    """Units (pages, or slots of state) of each group by the pages of the first: fixed[g] + per_page[g] * pages."""

    page_size: int
    groups: tuple[Group, ...]
    unit_bytes: tuple[int, ...]  # of a page, or a slot
    fixed: tuple[int, ...]
    per_page: tuple[float, ...]
    written: int  # slots of state that running requests write

    @property
    def fixed_bytes(self) -> int:
        return sum(count * size for count, size in zip(self.fixed, self.unit_bytes, strict=True))

    @property
    def bytes_per_token(self) -> int:
        """What a token of the first group costs in all groups, rounded up."""
        page = sum(count * size for count, size in zip(self.per_page, self.unit_bytes, strict=True))
        return max(1, -int(-page // self.page_size))

    def num_pages(self, tokens: int) -> tuple[int, ...]:
        """Of each group, scratch included, for so many tokens of the first."""
        pages = tokens // self.page_size
        found: list[int] = []
        for number, group in enumerate(self.groups):
            count = self.fixed[number] + int(self.per_page[number] * pages)
            if number and group.kind == "pages":
                count = min(count, pages)
            found.append(max(count, 1) + 1)
        return tuple(found)

    def decisions(self, tokens: int) -> list[Decision]:
        """A line for each group but the first, where there are others or the first is not one of whole pages."""
        return [
            self._decision(number, count - 1)
            for number, count in enumerate(self.num_pages(tokens))
            if number or self.groups[number].kind == "state"
        ]

    def _decision(self, number: int, count: int) -> Decision:
        group, size = self.groups[number], self.unit_bytes[number]
        told = f"{count * size / GIB:.2f} GiB for {len(group.layers)} layers"
        if group.kind == "cross":
            return Decision("cross_memory", count, f"pages, {told}: those of every running request")
        if group.kind == "state":
            why = f"slots, {told}: {self.written} that requests write, {count - self.written} snapshots"
            if number:
                why += f"; one takes the memory of {size * self.page_size / self.unit_bytes[0]:.0f} tokens"
            return Decision("states", count, why)
        why = "as many as of the rest"
        if self.fixed[number]:
            why = f"{self.fixed[number]} pages for what runs, 1 cached for each {CACHED_WINDOWS} of the rest"
        return Decision(f"window_{group.window}", count * self.page_size, f"tokens ({count} pages, {told}): {why}")


def shares(
    memory: Sequence[MemorySpec],
    groups: Sequence[Group],
    dtype: torch.dtype,
    size: int,
    load: Load,
    stages: Sequence[Collection[int]] = (),
) -> list[Shares]:
    """The ways to divide: with the widest windows as large as the first group, none of them to all.

    Whichever gives the first group more tokens is right: a window needs no more pages than everything does.
    """
    each = KVPool.bytes_per_token(memory, dtype, stages)
    unit = tuple(count * (1 if group.kind == "state" else size) for count, group in zip(each, groups, strict=True))
    windows = [number for number, group in enumerate(groups) if number and group.kind == "pages"]
    return [_share(tuple(groups), unit, size, load, set(windows[:capped])) for capped in range(len(windows) + 1)]


def _share(groups: tuple[Group, ...], unit: tuple[int, ...], size: int, load: Load, capped: set[int]) -> Shares:
    fixed, per_page = [0] * len(groups), [1.0] * len(groups)
    for number, group in enumerate(groups):
        if group.kind == "state":
            fixed[number] = READ_STATES * load.running if number else (READ_STATES + 1) * load.running
            others = sum(unit[at] * per_page[at] for at in range(number))
            per_page[number] = others / (SNAPSHOT_SHARE * unit[number]) if number else 0.0
        elif group.kind == "cross":
            fixed[number], per_page[number] = load.running * group.pages_each(size), 0.0
        elif number and number not in capped:
            fixed[number] = running_pages(group, size, load)
            per_page[number] = 1 / CACHED_WINDOWS
    return Shares(size, groups, unit, tuple(fixed), tuple(per_page), SLOTS * load.running)


def running_pages(group: Group, size: int, load: Load) -> int:
    """Pages of a group with a window that all running requests hold at most.

    Each has its window, a page at either border and one to grow into; the tokens of two steps are in flight, whoever's
    they are.
    """
    window = min(group.window, load.context)
    return load.running * (-(-window // size) + 2) + -(-2 * load.chunk // size)
