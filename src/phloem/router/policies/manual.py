"""The worker that the client names (`x-worker`); a session stays where it was; anything else where least is to do."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.router.policies._base import Chosen, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.router.ask import Ask
    from phloem.router.worker import Worker

MOST_SESSIONS = 100_000


class Choice(Policy):
    """Raises BadRequest where a named worker cannot be asked."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._places: OrderedDict[str, str] = OrderedDict()  # session -> address

    def choose(self, ask: Ask, workers: Sequence[Worker]) -> Chosen:
        if ask.target:
            return Chosen(self.asked(ask, workers)[0], "named by the client")
        place = self._places.get(ask.session) if ask.session else None
        found = next((worker for worker in workers if worker.url == place), None)
        return Chosen(found, "its session is here") if found else Chosen(self.least(workers), "least work")

    def asked(self, ask: Ask, workers: Sequence[Worker]) -> Sequence[Worker]:
        """The one that is named, and no other when it fails."""
        found = [worker for worker in workers if ask.target in ("", worker.id, worker.url)]
        if not found:
            raise BadRequest(f"x-worker: {ask.target!r:.200} is no worker of this model", param="x-worker")
        return found

    def sent(self, ask: Ask, worker: Worker) -> None:
        if not ask.session:
            return
        self._places[ask.session] = worker.url
        self._places.move_to_end(ask.session)
        if len(self._places) > MOST_SESSIONS:
            self._places.popitem(last=False)
