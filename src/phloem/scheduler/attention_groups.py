"""Which group of ranks a request is attended to by, where each has rows and pages of its own: a pure decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.scheduler.plan import promised_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phloem.kvcache.manager import CacheManager
    from phloem.scheduler.state import Slots

STICKY = 1.25  # a known prefix decides as long as its group has no more than so many times the least work


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """One group as it stands. `work`: tokens that its requests attend to; `cached`: those of the prompt that it has."""

    number: int
    free: int  # slots
    work: int
    cached: int
    room: bool = True  # whether its pages hold the request


def choose(loads: Sequence[GroupLoad], length: int) -> int | None:
    """The group for a request of so many tokens: the one with the longest known prefix, unless that leaves it with
    far more to do than the one with the least; None: no group has a slot."""
    able = [load for load in loads if load.free > 0]
    able = [load for load in able if load.room] or able
    if not able:
        return None
    least = min(able, key=lambda load: (load.work, load.number))
    known = max(able, key=lambda load: (load.cached, -load.work, -load.number))
    if known.cached and known.work + length - known.cached <= STICKY * (least.work + length):
        return known.number
    return least.number


class Groups:
    """The groups while one step's entries are chosen: who is given one counts there at once."""

    def __init__(self, slots: Slots, cache: CacheManager, share: float) -> None:
        """`share`: of the output to come, what must fit (`plan.Means`)."""
        self._cache, self._free = cache, [slots.free_of(part) for part in range(slots.parts)]
        self._work = [0] * slots.parts
        self._pages = [0] * slots.parts  # that are not spoken for
        if slots.parts > 1:
            promised = promised_in_each(slots, share)
            self._pages = [
                part.available_pages - (promised[at] if slots.num_in(at) else 0) for at, part in enumerate(cache.parts)
            ]
            staying = slots.staying()
            for part in range(slots.parts):
                self._work[part] = int(slots.length[staying[slots.part_of(staying) == part]].sum())

    def of(self, namespace: str, known: NDArray[np.int32], limit: int) -> int | None:
        """The group of a request that waits; None: none has a slot for it."""
        if len(self._free) == 1:
            return 0
        size, parts = self._cache.page_size, self._cache.parts
        loads: list[GroupLoad] = []
        for number, part in enumerate(parts):
            cached = part.probe(namespace, known, limit).num_pages
            room = self._pages[number] >= part.pages_for(len(known)) - cached
            loads.append(GroupLoad(number, self._free[number], self._work[number], cached * size, room))
        found = choose(loads, len(known))
        if found is not None:
            self._free[found] -= 1
            self._pages[found] -= parts[found].pages_for(len(known)) - loads[found].cached // size
            self._work[found] += len(known)
        return found


def promised_in_each(slots: Slots, share: float) -> list[int]:
    """Pages of each group that its running requests will want."""
    staying = slots.staying()
    of = slots.part_of(staying)
    return [promised_to(slots, staying[of == part], share) for part in range(slots.parts)]
