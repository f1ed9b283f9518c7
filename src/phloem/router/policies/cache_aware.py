"""The worker that answers first: what it has to do already, and what of the prompt it would have to compute.

What is cached where is known exactly for workers whose cache events are followed, if the prompt is known in tokens;
for others it is guessed from what was sent to them. Reuse is thereby weighed in seconds against a queue: a long prompt
goes where it is cached unless that worker has more to do than computing it anew elsewhere would take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.router.ask import BYTES_A_TOKEN, PIECE
from phloem.router.policies._base import Chosen, Policy
from phloem.router.prefixes import Prefixes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.router.ask import Ask
    from phloem.router.worker import Worker

EQUAL = 0.02  # seconds by which two may differ and still be equals


class Choice(Policy):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._seen = Prefixes(self.settings.max_tree_size)

    def choose(self, ask: Ask, workers: Sequence[Worker]) -> Chosen:
        workers, uneven = self._near_least(workers)
        hits = self.hits(ask, workers)
        costs = [(worker.seconds(ask.tokens - hits.get(worker.bit, 0.0)), worker) for worker in workers]
        best = min(cost for cost, _ in costs)
        equals = [worker for cost, worker in costs if cost <= best + EQUAL]
        most = max(hits.get(worker.bit, 0.0) for worker in equals)
        found = self.least([worker for worker in equals if hits.get(worker.bit, 0.0) >= most])
        why = f"{most:.0f} of {ask.tokens:.0f} tokens cached" if most else "nothing cached"
        return Chosen(found, f"{why}, {best:.2f} s of work{uneven}", most)

    def hits(self, ask: Ask, workers: Sequence[Worker]) -> dict[int, float]:
        """Bit -> tokens of the prompt that the worker has."""
        found: dict[int, float] = {}
        exact = [worker.bit for worker in workers if ask.ids is not None and self.cached.knows(worker.bit)]
        if exact and ask.ids is not None:
            found |= {bit: float(count) for bit, count in self.cached.match(ask.ids, ask.salt, exact).items()}
        guessed = sum(1 << worker.bit for worker in workers if worker.bit not in exact)
        if not guessed or not ask.prompt:
            return found
        a_token = len(ask.prompt) / ask.tokens if ask.tokens else BYTES_A_TOKEN
        for bit, count in self._seen.match(ask.pieces, guessed).items():
            tokens = min(count * PIECE / a_token, ask.tokens)
            if tokens > self.settings.cache_threshold * ask.tokens:
                found[bit] = tokens
        return found

    def sent(self, ask: Ask, worker: Worker) -> None:
        if ask.prompt:
            self._seen.add(ask.pieces, worker.bit)

    def gone(self, worker: Worker) -> None:
        self._seen.forget(worker.bit)

    def _near_least(self, workers: Sequence[Worker]) -> tuple[Sequence[Worker], str]:
        """All of them; where one has far too many requests, only those near the emptiest one."""
        counts = [worker.running for worker in workers]
        few, many = min(counts), max(counts)
        if many - few <= self.settings.balance_abs_threshold or many <= few * self.settings.balance_rel_threshold:
            return workers, ""
        most = max(few * self.settings.balance_rel_threshold, few + self.settings.balance_abs_threshold / 2)
        return [worker for worker in workers if worker.running <= most], ", among the emptier ones"
