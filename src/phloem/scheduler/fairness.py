"""Who has had the least comes first: a waiting queue that keeps each client's requests apart.

Each client has a counter of the work that was done for it: tokens of prompts that were computed, and output tokens,
which weigh twice as much (virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", OSDI
2024). The next request is one of the client with the smallest counter. A client that comes, or comes back, begins where
the one stands that was served last: being idle is not saved up. Among requests of one client the policy decides.

Answers are charged when they begin, by how long answers have been, and put right when they end: else a client with many
long answers would look cheap for as long as they run.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phloem.scheduler.policies import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phloem.core.messages import Submit
    from phloem.core.targets import Fair
    from phloem.kvcache.manager import CacheManager
    from phloem.scheduler.policies import Policy
    from phloem.scheduler.state import Request

OUTPUT = 2.0  # work of an output token, in prompt tokens
USUAL_OUTPUT = 128.0  # tokens of an answer, before any has ended
LEARNS = 0.02  # weight of the newest answer's length
RANKED = 8  # clients whose requests the policy may reorder in one step
SWEEP = 1024  # clients from which on those that have nothing here are forgotten


def client_of(fair: Fair, submit: Submit) -> str:
    """By what requests are told apart: the client's key, or the user that the client names, else its key."""
    return (submit.user or submit.key) if fair == "user" else submit.key


@dataclass(slots=True)
class Client:
    name: str
    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    served: float = 0.0
    running: int = 0  # of its requests, those that were admitted and have not ended

    @property
    def idle(self) -> bool:
        return not self.running and not len(self.waiting)


class FairQueue(WaitingQueue):
    """Has the face of `WaitingQueue`. `everything` is in no order."""

    def __init__(self, fair: Fair) -> None:
        super().__init__()
        self._fair: Fair = fair
        self._clients: dict[str, Client] = {}
        self._count = self._running = 0  # requests
        self._level = 0.0  # where the client stood that was served last
        self._usual = USUAL_OUTPUT
        self._sweep = SWEEP

    def __len__(self) -> int:
        return self._count

    def add(self, request: Request) -> None:
        client = self._client(request.submit)
        if client.idle:
            client.served = max(client.served, self._level)
        client.waiting.add(request)
        self._count += 1
        self.tokens += request.num_prompt

    def front(self, count: int) -> list[Request]:
        merged = self._merged({client.name: iter(client.waiting.front(count)) for client in self._waiting()})
        return [request for _, request in zip(range(count), merged, strict=False)]

    def order(self, policy: Policy, count: int, cache: CacheManager) -> Iterator[Request]:
        ranked = 0

        def of(client: Client) -> Iterator[Request]:
            nonlocal ranked
            if len(client.waiting) == 1 or ranked >= RANKED:
                yield from client.waiting.front(count)
                return
            ranked += 1
            yield from policy.order(client.waiting, count, cache)

        return self._merged({client.name: of(client) for client in self._waiting()})

    def everything(self) -> list[Request]:
        return [request for client in self._waiting() for request in client.waiting.everything()]

    def take(self, request: Request) -> None:
        client = self._client(request.submit)
        self.taken += 1
        client.waiting.taken += 1
        self.remove(request)
        if request.charged >= 0:
            return  # that it was preempted is not its client's doing
        request.charged = self._expected(request)
        self._level = max(self._level, client.served)
        client.served += max(1, request.num_prompt - request.cached_tokens) + OUTPUT * request.charged
        client.running += 1
        self._running += 1

    def remove(self, request: Request) -> None:
        client = self._client(request.submit)
        client.waiting.remove(request)
        self._count -= 1
        self.tokens -= request.num_prompt

    def ended(self, request: Request) -> None:
        """A request that may have been admitted is over: what it was charged is put right."""
        client = self._clients.get(client_of(self._fair, request.submit))
        if client is None or request.charged < 0:
            return
        client.running -= 1
        self._running -= 1
        client.served += OUTPUT * (len(request.output) - request.charged)
        request.charged = -1.0
        if not self._running and not self._count:
            self._clients.clear()  # nobody competes: who comes next begins anew
            self._level = 0.0
        self._usual += LEARNS * (len(request.output) - self._usual)

    def clear(self) -> None:
        for client in self._clients.values():
            client.waiting.clear()
        self._count = self.tokens = 0

    def ahead(self, submit: Submit, tokens: int) -> int:
        """Of every other client as much as of this one, with its new prompt, comes before that prompt."""
        name = client_of(self._fair, submit)
        own = self._clients[name].waiting.tokens if name in self._clients else 0
        return own + sum(min(one.waiting.tokens, own + tokens) for one in self._waiting() if one.name != name)

    def has_share(self, submit: Submit, most: int) -> bool:
        """A client with less than its part of the queue gets in, whoever else has filled it."""
        name = client_of(self._fair, submit)
        waiting = [client for client in self._waiting() if client.name != name]
        own = len(self._clients[name].waiting) if name in self._clients else 0
        return bool(waiting) and own < most // (len(waiting) + 1)

    def charges(self) -> dict[str, float]:
        """Where each client stands, since somebody has been here all the time."""
        return {name: client.served for name, client in self._clients.items()}

    def clients(self) -> list[Client]:
        return list(self._clients.values())

    def _client(self, submit: Submit) -> Client:
        name = client_of(self._fair, submit)
        found = self._clients.get(name)
        if found is None:
            if len(self._clients) >= self._sweep:
                self._forget()
            found = self._clients[name] = Client(name)
        return found

    def _forget(self) -> None:
        """Of clients that have nothing here those are remembered that have had the most; the others begin at the level,
        where most of them are."""
        idle = sorted((one for one in self._clients.values() if one.idle), key=lambda one: -one.served)
        for one in idle[SWEEP // 2 :]:
            del self._clients[one.name]
        self._sweep = max(SWEEP, 2 * len(self._clients))

    def _waiting(self) -> Iterator[Client]:
        return (client for client in self._clients.values() if len(client.waiting))

    def _expected(self, request: Request) -> float:
        return min(float(max(0, request.limit - request.num_prompt)), self._usual)

    def _merged(self, requests: dict[str, Iterator[Request]]) -> Iterator[Request]:
        """One after the other, as if each were charged when its turn comes."""
        heap = [(self._clients[name].served, at, name) for at, name in enumerate(requests)]
        heapq.heapify(heap)
        while heap:
            served, at, name = heap[0]
            request = next(requests[name], None)
            if request is None:
                heapq.heappop(heap)
                continue
            work = request.num_prompt + OUTPUT * self._expected(request) if request.charged < 0 else 0.0
            heapq.heapreplace(heap, (served + work, at, name))
            yield request
