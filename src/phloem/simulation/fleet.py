"""The fleet in virtual time: one queue of events, the gateway's own policies, and what requests saw.

Every replica has its own clock: a turn of its loop begins at an event and ends, in one call of the scheduler, when the
step that it waited for has ended. What the turn tells is delivered then, in order with everything else that happens.
"""

from __future__ import annotations

import gc
import heapq
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.messages import Submit
from phloem.core.request import SamplingParams
from phloem.router.ask import USUAL_OUTPUT, Ask
from phloem.router.cached import Cached
from phloem.router.policies import POLICIES
from phloem.router.settings import Settings
from phloem.router.worker import Worker
from phloem.simulation.replica import Replica, Size
from phloem.simulation.seen import Seen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phloem.core.messages import Tokens
    from phloem.router.policies._base import Policy
    from phloem.router.worker import Load
    from phloem.simulation.clockwork import StepTime
    from phloem.simulation.traces import Conversation

_ARRIVE, _TELL, _TURN, _LOOK = range(4)


@dataclass(slots=True)
class _Flight:
    """A request on its way."""

    talk: Conversation
    prompt: NDArray[np.int32]
    began: float
    load: Load


def _account(number: int, settings: Settings) -> Worker:
    return Worker.at(f"http://replica-{number}:80", settings, number)


@dataclass
class Fleet:
    """`run` once. `cached`: what hears of the replicas' caches, where `events` says so. `accounts`: makes the worker by
    which the gateway knows the replica of a number."""

    size: Size
    seconds: StepTime
    replicas: int
    policy: str
    seed: int = 0
    events: bool = False  # the gateway follows cache events
    settings: Settings = field(default_factory=Settings)
    cached: Cached = field(default_factory=Cached)
    accounts: Callable[[int, Settings], Worker] = _account

    def __post_init__(self) -> None:
        follows = self.cached if self.events else None
        self.members = [Replica(number, self.size, self.seconds, follows) for number in range(self.replicas)]
        self.workers = [self.accounts(number, self.settings) for number in range(self.replicas)]
        made = POLICIES.get(self.policy)
        self.gateway: Policy = made(self.settings, self.cached, random.Random(self.seed))
        self.seen = Seen(self.replicas)
        self.turns = 0
        self._queue: list[tuple[float, int, int, Any]] = []
        self._order = count()
        self._flights: dict[str, _Flight] = {}
        self._arrivals = iter(())

    def run(self, talks: Iterable[Conversation], until: float = 0.0) -> Seen:
        """Until every conversation has ended, or for so many seconds, above 0."""
        self._arrivals = iter(talks)
        self._next_arrival()
        self._push(self.settings.health_check_interval_secs, _LOOK, None)
        gc.collect()
        gc.freeze()
        try:
            self._loop(until or math.inf)
        finally:
            gc.unfreeze()
        self.seen.unfinished = len(self._flights)
        for replica in self.members:
            planner = replica.scheduler.planner
            self.seen.ended(planner.prompt_tokens, planner.cached_tokens, planner.preemptions, replica.runner.busy)
        return self.seen

    def _loop(self, until: float) -> None:
        queue = self._queue
        while queue:
            now, _, kind, what = heapq.heappop(queue)
            if now > until:
                self.seen.end = until
                return
            if kind == _TURN:
                self._turn(what, now)
            elif kind == _TELL:
                self._tell(what[0], what[1], now)
            elif kind == _ARRIVE:
                self._arrive(what, now)
            else:
                self._look(now)

    def _push(self, at: float, kind: int, what: Any) -> None:
        heapq.heappush(self._queue, (at, next(self._order), kind, what))

    def _next_arrival(self) -> None:
        talk = next(self._arrivals, None)
        if talk is not None:
            self._push(talk.start, _ARRIVE, talk)

    # events

    def _arrive(self, talk: Conversation, now: float) -> None:
        """A turn of a conversation reaches the gateway; with a first one, the next conversation's is known."""
        if talk.at == 0:
            self._next_arrival()
        prompt, reused = talk.take(self.seed, self.size.context)
        output, name = talk.output, f"{talk.number}.{talk.at}"
        self.seen.asked(len(prompt), reused)
        ask = Ask(
            "/generate", "model", max(float(len(prompt)), 1.0), USUAL_OUTPUT, f"session-{talk.number}",
            prompt=prompt.tobytes(), ids=prompt.tolist() if self.events else None,
        )  # fmt: skip
        chosen = self.gateway.choose(ask, self.workers)
        worker = chosen.worker
        load = worker.take(ask.tokens, ask.output, chosen.cached)
        self.gateway.sent(ask, worker)
        self.seen.sent[worker.bit] += 1
        self._flights[name] = _Flight(talk, prompt, now, load)
        replica = self.members[worker.bit]
        sampling = SamplingParams(max_new_tokens=output, ignore_eos=True, sampling_seed=0)
        replica.inbox.append(Submit(id=name, input_ids=ask.prompt, sampling=sampling, tier=talk.tier, user=talk.user))
        if not replica.awake:
            replica.awake = True
            self._push(now, _TURN, replica)

    def _turn(self, replica: Replica, now: float) -> None:
        self.turns += 1
        moved = replica.turn(now)
        end = replica.clock.now
        if replica.news:
            news, replica.news = replica.news, []
            for message in news:
                if message.chunks:
                    self._push(end, _TELL, (replica.number, message))
                else:
                    self.seen.tokens(replica.number, message, end)
        if moved or replica.inbox:
            self._push(end, _TURN, replica)
        else:
            replica.awake = False

    def _tell(self, number: int, message: Tokens, now: float) -> None:
        """First tokens and ends: the gateway takes work off, and conversations go on."""
        self.seen.tokens(number, message, now)
        for chunk in message.chunks:
            flight = self._flights.get(chunk.id)
            if flight is None:
                continue
            if not flight.load.began and chunk.tokens:
                flight.load.first()
                self.seen.first(now - flight.began, flight.talk.tier)
            if chunk.finish is not None:
                self._ended(chunk.id, flight, now, failed=chunk.finish.type == "abort")

    def _ended(self, name: str, flight: _Flight, now: float, *, failed: bool) -> None:
        del self._flights[name]
        flight.load.end()
        talk = flight.talk
        if failed:
            self.seen.failed += 1
            return
        self.seen.done(now - flight.began, talk.output, now)
        pause = talk.answered(flight.prompt)
        if pause is not None:
            self._push(now + pause, _ARRIVE, talk)

    def _look(self, now: float) -> None:
        """As the gateway asks `/v1/loads`: how fast each computes prompts."""
        running: list[int] = []
        for replica, worker in zip(self.members, self.workers, strict=True):
            meter = replica.scheduler.meter
            worker.learn(
                {
                    "total_prefill_uncached_tokens": meter.prefill_tokens,
                    "total_prefill_busy_us": round(meter.prefill_seconds * 1e6),
                }
            )
            running.append(worker.running)
        self.seen.spread(running)
        if self._queue:
            self._push(now + self.settings.health_check_interval_secs, _LOOK, None)
