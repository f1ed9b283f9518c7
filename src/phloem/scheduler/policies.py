"""Who runs next: functions from a queue to an order, and the queue that they order.

A policy gives each request a *key* once (its place in the queue, and in reverse the order of preemption) and may
reorder the front window of the queue in each step. So a step costs the same with 10 and with 100,000 waiting.

No policy starves a request:
* `fcfs` is by arrival.
* `priority` ages: one level of priority is worth `PRIORITY_SECONDS` of waiting. As all age alike, the order of two
  requests never changes, so the key is fixed: arrival - priority * PRIORITY_SECONDS. Where there is no room for the
  first that waits, a running request that is `YIELDS` levels below it, and behind it by its key, waits in its place.
* `lpm` (longest cached prefix first) ranks the oldest `WINDOW` requests; whoever has been in the window while
  `PATIENCE` others were admitted goes first.
* `deadline` is by when the first token is due; whoever cannot make it any more stands back once (`tempo.py`).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from phloem.core.messages import Submit
    from phloem.kvcache.manager import CacheManager
    from phloem.scheduler.state import Request

PRIORITY_SECONDS = 20.0
MAX_PRIORITY = 100  # levels beyond this count as this many
YIELDS = 10  # levels above a running request from which on one that waits takes its place
WINDOW = 128
PATIENCE = 2 * WINDOW
PROBES = 32  # prefix lookups that ranking may cost in one step

_HOLE: Any = (0.0, 0, None)


class WaitingQueue:
    """Waiting requests by key: a sorted array whose front moves, so that taking from the front is cheap."""

    def __init__(self) -> None:
        self._items: list[tuple[float, int, Request]] = []  # before `_head`: holes
        self._head = 0
        self.taken = 0  # requests that were admitted from here
        self.tokens = 0  # of the prompts that wait

    def __len__(self) -> int:
        return len(self._items) - self._head

    def add(self, request: Request) -> None:
        bisect.insort(self._items, (request.key, request.seq, request), lo=self._head)
        self.tokens += request.num_prompt

    def order(self, policy: Policy, count: int, cache: CacheManager) -> Iterable[Request]:
        """At least the first `count` candidates of a step, if there are so many."""
        return policy.order(self, count, cache)

    def ended(self, request: Request) -> None:
        """A request is over, wherever it stood; it does not wait here any more."""

    def ahead(self, submit: Submit, tokens: int) -> int:
        """Tokens of waiting prompts that come before a new one of so many."""
        return self.tokens

    def has_share(self, submit: Submit, most: int) -> bool:
        """Whether a request gets in although `most` wait already."""
        return False

    def front(self, count: int) -> list[Request]:
        return [item[2] for item in self._items[self._head : self._head + count]]

    def everything(self) -> list[Request]:
        return self.front(len(self))

    def take(self, request: Request) -> None:
        """Remove a request because it is admitted."""
        self.taken += 1
        self.remove(request)

    def remove(self, request: Request) -> None:
        """Remove a request wherever it stands. Near the front this costs what stands before it."""
        items, head = self._items, self._head
        at = bisect.bisect_left(items, (request.key, request.seq), lo=head)  # type: ignore[type-var]
        if at >= len(items) or items[at][2] is not request:
            raise KeyError(request.id)
        self.tokens -= request.num_prompt
        if at - head > len(items) - at:
            del items[at]
            return
        items[head + 1 : at + 1] = items[head:at]
        items[head] = _HOLE
        self._head = head + 1
        if self._head > 1024 and self._head * 2 > len(items):
            del items[: self._head]
            self._head = 0

    def clear(self) -> None:
        self._items.clear()
        self._head = self.tokens = 0


@dataclass(frozen=True)
class Policy:
    """`key(request)` at arrival; `order(queue, count, cache)`: at least the first `count` candidates of this step.

    `due`: it goes by what requests are promised, and those that are late stand back. `yields`: levels of priority from
    which on one that waits takes a running one's place; 0: none does.
    """

    name: str
    key: Callable[[Request], float]
    order: Callable[[WaitingQueue, int, CacheManager], list[Request]]
    due: bool = False
    yields: int = 0


def _by_arrival(request: Request) -> float:
    return request.received


def level_of(request: Request) -> int:
    return max(-MAX_PRIORITY, min(MAX_PRIORITY, request.submit.priority))


def _by_priority(request: Request) -> float:
    level = level_of(request)
    return request.received - level * PRIORITY_SECONDS


def _by_due(request: Request) -> float:
    return request.due


def _as_queued(queue: WaitingQueue, count: int, cache: CacheManager) -> list[Request]:
    return queue.front(count)


def _longest_prefix(queue: WaitingQueue, count: int, cache: CacheManager) -> list[Request]:
    window = queue.front(max(WINDOW, count))
    for request in window:
        if request.passed_mark < 0:
            request.passed_mark = queue.taken
    stale = [request for request in window if request.match_version != cache.version]
    for request in sorted(stale, key=_match_version)[:PROBES]:
        found = cache.probe(request.namespace, request.prompt, request.match_limit())
        request.match_pages, request.match_version = found.num_pages, cache.version
    overdue = queue.taken - PATIENCE
    # Sorting is stable: the overdue, and those with equal prefixes, keep the order of arrival.
    return sorted(window, key=lambda item: (0, 0) if item.passed_mark <= overdue else (1, -item.match_pages))


def _match_version(request: Request) -> int:
    return request.match_version


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("fcfs", _by_arrival, _as_queued),
        Policy("lpm", _by_arrival, _longest_prefix),
        Policy("priority", _by_priority, _as_queued, yields=YIELDS),
        Policy("deadline", _by_due, _as_queued, due=True),
    )
}
