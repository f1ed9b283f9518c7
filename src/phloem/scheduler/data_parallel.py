"""Which of several replicas of a model a request goes to: by what each has to do, and by what it has seen before.

A replica's load is counted at the door, so that it is true at once: the tokens of prompts that it has not seen, and the
tokens that it has given since, of all requests that have not ended. What it has seen is what it was sent: blocks of
prompts, the oldest of which are forgotten. Its cache may have dropped some of them; then a choice is worse, not wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Method = Literal["auto", "round_robin", "total_requests", "total_tokens"]

WHY: dict[str, str] = {
    "auto": "the one with the fewest tokens to do, of those that know as much of the prompt",
    "round_robin": "in turn",
    "total_requests": "the one with the fewest requests",
    "total_tokens": "the one with the fewest tokens to do",
}

BLOCK = 64  # tokens that are remembered together
TOKEN_BYTES = 4
MOST_BLOCKS = 1 << 16
STICKY = 1.25  # a replica that knows the prompt is taken up to so many times the work of the least loaded


@dataclass(slots=True)
class _Request:
    rank: int
    tokens: int  # of its prompt, that its replica has not seen
    begun: int = -1  # steps that the replica had told when its first token came; -1: it has not


@dataclass(slots=True)
class _Load:
    """Of one replica. Its requests gain a token with about every step that it tells: they need not be counted each."""

    waiting: int = 0  # tokens of prompts, unseen
    running: int = 0  # requests that have begun
    steps: int = 0
    since: int = 0  # the sum of their `begun`
    requests: set[str] = field(default_factory=set[str])

    @property
    def tokens(self) -> int:
        return self.waiting + self.running * self.steps - self.since


class Balancer:
    """One door's account of its replicas. Pure: it is told what happens, and asked."""

    def __init__(self, ranks: int, method: Method = "auto", most: int = MOST_BLOCKS) -> None:
        self.method = method
        self._loads = [_Load() for _ in range(ranks)]
        self._requests: dict[str, _Request] = {}
        self._seen: OrderedDict[int, int] = OrderedDict()  # block -> bits of the replicas that were sent it
        self._most, self._turn = most, 0

    def tokens(self, rank: int) -> int:
        """What a replica has to do, or has done for requests that have not ended."""
        return self._loads[rank].tokens

    def requests(self, rank: int) -> int:
        """How many have not ended."""
        return len(self._loads[rank].requests)

    def of(self, key: str) -> int | None:
        """Where a request is; None: it has ended."""
        found = self._requests.get(key)
        return None if found is None else found.rank

    def choose(self, key: str, ids: bytes, namespace: str, serving: Sequence[int]) -> int:
        """One of the replicas `serving`, for a request of these token ids (int32), which from now on is its."""
        blocks = list(_blocks(ids, namespace))
        known = self._known(blocks)
        rank = self._chosen(len(ids) // TOKEN_BYTES, known, serving)
        self._take(key, rank, len(ids) // TOKEN_BYTES - known[rank], blocks)
        return rank

    def give(self, key: str, ids: bytes, namespace: str, rank: int) -> None:
        """A request goes to this replica, whatever its load."""
        blocks = list(_blocks(ids, namespace))
        self._take(key, rank, len(ids) // TOKEN_BYTES - self._known(blocks)[rank], blocks)

    def stepped(self, rank: int) -> None:
        """It has told of one more step."""
        self._loads[rank].steps += 1

    def began(self, key: str) -> None:
        """Its first token has come. Harmless when repeated."""
        request = self._requests.get(key)
        if request is not None and request.begun < 0:
            load = self._loads[request.rank]
            request.begun = load.steps
            load.running, load.since = load.running + 1, load.since + load.steps

    def ended(self, key: str) -> None:
        """Harmless when repeated."""
        request = self._requests.pop(key, None)
        if request is None:
            return
        load = self._loads[request.rank]
        load.requests.discard(key)
        load.waiting -= request.tokens
        if request.begun >= 0:
            load.running, load.since = load.running - 1, load.since - request.begun

    def lost(self, rank: int) -> list[str]:
        """A replica has gone: the requests that it had, which have ended. It knows nothing any more."""
        found = list(self._loads[rank].requests)
        for key in found:
            del self._requests[key]
        self._loads[rank] = _Load()
        self.forget(rank)
        return found

    def forget(self, rank: int) -> None:
        """Its cache is empty."""
        keep = ~(1 << rank)
        self._seen = OrderedDict((block, ranks & keep) for block, ranks in self._seen.items() if ranks & keep)

    def _chosen(self, size: int, known: list[int], serving: Sequence[int]) -> int:
        if self.method == "round_robin":
            found = serving[self._turn % len(serving)]
            self._turn += 1
            return found
        if self.method == "total_requests":
            return min(serving, key=lambda rank: (self.requests(rank), self.tokens(rank), rank))
        if self.method == "total_tokens":
            return min(serving, key=lambda rank: (self.tokens(rank), self.requests(rank), rank))
        work = {rank: self.tokens(rank) + size - known[rank] for rank in serving}
        least = min(serving, key=lambda rank: (work[rank], self.requests(rank), rank))
        knows = max(serving, key=lambda rank: (known[rank], -work[rank], -rank))
        return knows if known[knows] > known[least] and work[knows] <= STICKY * work[least] else least

    def _known(self, blocks: list[int]) -> list[int]:
        """Of each replica the tokens at the beginning of a prompt that it was sent before."""
        found = [0] * len(self._loads)
        left = (1 << len(found)) - 1
        for number, block in enumerate(blocks):
            now = left & self._seen.get(block, 0)
            for rank in range(len(found)):
                if (left & ~now) >> rank & 1:
                    found[rank] = number * BLOCK
            left = now
            if not left:
                return found
        return [len(blocks) * BLOCK if left >> rank & 1 else known for rank, known in enumerate(found)]

    def _take(self, key: str, rank: int, tokens: int, blocks: list[int]) -> None:
        load = self._loads[rank]
        self._requests[key] = _Request(rank, tokens)
        load.requests.add(key)
        load.waiting += tokens
        for block in blocks:
            self._seen[block] = self._seen.pop(block, 0) | 1 << rank
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)


def _blocks(ids: bytes, namespace: str) -> Iterator[int]:
    """A number for each whole block of a prompt, that stands for all tokens up to its end."""
    size, found = BLOCK * TOKEN_BYTES, hash(namespace)
    for at in range(0, len(ids) - size + 1, size):
        found = hash((found, ids[at : at + size]))
        yield found
