"""One worker after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.router.policies._base import Chosen, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.router.ask import Ask
    from phloem.router.worker import Worker


class Choice(Policy):
    _last = -1  # the bit of the one that was chosen last

    def choose(self, ask: Ask, workers: Sequence[Worker]) -> Chosen:
        later = [worker for worker in workers if worker.bit > self._last]
        found = min(later or workers, key=lambda worker: worker.bit)
        self._last = found.bit
        return Chosen(found, "its turn")
