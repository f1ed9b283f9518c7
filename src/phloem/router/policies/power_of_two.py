"""Of two that are drawn, the one with less work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.router.policies._base import Chosen, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.router.ask import Ask
    from phloem.router.worker import Worker


class Choice(Policy):
    def choose(self, ask: Ask, workers: Sequence[Worker]) -> Chosen:
        if len(workers) == 1:
            return Chosen(workers[0], "the only one")
        one, other = self.draw.sample(workers, 2)
        found = one if one.seconds() <= other.seconds() else other
        return Chosen(found, f"less work of two, {found.seconds():.2f} s")
