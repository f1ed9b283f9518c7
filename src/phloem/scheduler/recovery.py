"""After a step that failed for lack of memory: back to where its rows stood before it, and on in smaller steps.

The step, and those that were launched behind it, never happened: every row's computed tokens are what they were, what
these steps gave to the prefix tree is taken out of it, and tokens in flight are forgotten. Whatever was sampled before
is kept, so no token is lost or said twice; draws depend on seed and position alone, so the tokens are the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.kvcache import undo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kvcache.manager import CacheManager
    from phloem.scheduler.plan import Plan
    from phloem.scheduler.state import Request, Slots


@dataclass(slots=True)
class Throttle:
    """How many tokens a step may have. Halved when memory runs out; grows back, slowly where it failed before.

    `full` is what the settings say. A row takes a token at least, so this bounds the rows as well.
    """

    full: int
    budget: int
    failed_at: int = 0  # size of the smallest step that has failed lately; 0: none

    @staticmethod
    def of(full: int) -> Throttle:
        return Throttle(full, full)

    @property
    def active(self) -> bool:
        return self.budget < self.full

    def failed(self, tokens: int) -> None:
        """A step of so many tokens did not fit."""
        self.budget = max(1, min(self.budget, tokens) // 2)
        self.failed_at = tokens

    def passed(self) -> None:
        """A step did fit: a sixteenth more, but near the size that failed only a 256th."""
        if not self.active:
            return
        near = self.budget * 4 >= self.failed_at * 3
        grown = self.budget + max(1, self.budget // (256 if near and self.failed_at else 16))
        self.budget = min(self.full, grown)
        if self.budget > self.failed_at * 5 // 4:
            self.failed_at = 0


def roll_back(slots: Slots, cache: CacheManager, plans: Sequence[Plan]) -> None:
    """Undo launched steps: `plans` are all that are not committed, the failed one first.

    Every running request is left as if it had never been in them, still in its slot; requests that lost theirs
    meanwhile only forget what was in flight. One that has lost pages, or read what was never computed, goes on from
    where its lease ends.
    """
    before: dict[Request, int] = {}
    for plan in plans:
        entered = {admission.slot for admission in plan.batch.admissions}
        for request, slot, prefix in zip(
            plan.rows, plan.batch.slots.tolist(), plan.batch.prefix_lens.tolist(), strict=True
        ):
            # A request that was preempted and came back is where its later admission put it.
            if request.slot == slot and (request not in before or slot in entered):
                before[request] = prefix
            request.forget_inflight()
            request.match_version = -1
    running = slots.running()
    leases = [(request.lease, request.match_limit() // cache.page_size) for request in running if request.lease]
    given = [item for plan in plans for item in plan.given]
    for part in cache.parts:
        held = [(lease, limit) for lease, limit in leases if lease.part == part.number]
        undo.roll_back(part, plans[0].mark, held, [item for item in given if item.lease.part == part.number])
    slots.moved = True
    for request in running:
        computed = before.get(request, int(slots.computed[request.slot]))
        slots.restore(request, computed)
