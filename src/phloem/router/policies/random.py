"""Any worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.router.policies._base import Chosen, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.router.ask import Ask
    from phloem.router.worker import Worker


class Choice(Policy):
    def choose(self, ask: Ask, workers: Sequence[Worker]) -> Chosen:
        return Chosen(self.draw.choice(workers), "drawn")
