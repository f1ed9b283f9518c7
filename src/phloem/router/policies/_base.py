"""What every policy is: a choice among workers that may be asked, and the reason for it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.router.ask import Ask
    from phloem.router.cached import Cached
    from phloem.router.settings import Settings
    from phloem.router.worker import Worker


class Chosen(NamedTuple):
    """`cached`: tokens of the prompt that it has, as far as is known."""

    worker: Worker
    why: str
    cached: float = 0.0
    prefill: Worker | None = None  # of a pair: who computes the prompt, and how much of it that one has
    prefill_cached: float = 0.0


class Policy:
    """`choose` gets at least one worker. One for each model; one thread calls it."""

    def __init__(self, settings: Settings, cached: Cached, draw: random.Random) -> None:
        self.settings, self.cached, self.draw = settings, cached, draw

    def choose(self, ask: Ask, workers: Sequence[Worker]) -> Chosen:
        raise NotImplementedError

    def asked(self, ask: Ask, workers: Sequence[Worker]) -> Sequence[Worker]:
        """Those of a model's workers, well or not, that may be asked at all."""
        return workers

    def sent(self, ask: Ask, worker: Worker) -> None:
        """The request went there, and its prompt will be cached there."""

    def gone(self, worker: Worker) -> None:
        """The worker was removed, or has started anew: it has forgotten everything."""

    def least(self, workers: Sequence[Worker]) -> Worker:
        """The one that would be through with its work first; of equals, any."""
        found = min(worker.seconds() for worker in workers)
        equals = [worker for worker in workers if worker.seconds() <= found]
        return equals[0] if len(equals) == 1 else self.draw.choice(equals)
