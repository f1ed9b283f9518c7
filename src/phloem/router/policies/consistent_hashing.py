"""The same worker for the same session, user or prompt, and few that move when workers come and go."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from phloem.router.policies._base import Chosen, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.router.ask import Ask
    from phloem.router.worker import Worker

BEGINNING = 256  # bytes of a prompt that stand for a session where none is named


class Choice(Policy):
    """Rendezvous hashing: each worker draws a number for the key, and the highest one has it."""

    def choose(self, ask: Ask, workers: Sequence[Worker]) -> Chosen:
        key = ask.session.encode() or ask.prompt[:BEGINNING]
        if not key:
            return Chosen(self.least(workers), "no session: least work")
        found = max(workers, key=lambda worker: blake2b(key + worker.url.encode(), digest_size=8).digest())
        return Chosen(found, "by its session" if ask.session else "by its beginning")
