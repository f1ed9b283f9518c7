"""How many drafts a step verifies: as many as are worth their time, by what steps have taken and drafts have proved.

A step of n rows takes T(n), measured. Drafts d of a row are accepted with probability p each while all before them
were, so a row is expected to yield 1 + p1 + p1 p2 + ... tokens. The drafts of all rows are put in the order of how
likely they count, and of all prefixes of that order the one with the most tokens per second is verified, if that is
more than plain decoding gives. Plain steps are planned while the step before runs, and verified ones cannot be: the
times of the two are kept apart, each from one result to the next, so that what planning costs is part of the figure.

While nothing pays the engine decodes plainly (`on` False) and texts are only looked at. What was verified and did not
pay is stopped, for longer each time; now and then it is tried again. Everything here is arithmetic: no clock, no texts.
"""

from __future__ import annotations

import heapq
import statistics
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.speculation.texts import Tally

MARGIN = 1.08  # times plain decoding: less is not worth the risk
BEGIN = 1.25  # the same before the first drafts of a run: where few are ever right, most of them stay unverified
WARY = 1.4  # the same for a while after drafts have lost time: what is far better than plain decoding goes on
QUIET = 2  # steps without a draft after which plain steps are planned ahead again
ENOUGH = 3  # plain steps that are measured before anything is verified
LEDGER = 12  # steps after which a gain is written off, so that it pays for no later loss
LOSS = 1.5  # plain steps that verified ones may lose before they are stopped
LATE = 1.25  # times the usual: what a step took beyond that the machine took, and it is not held against drafts
KEPT = 9  # steps of a size that the median is of
SAME = 0.01  # a median that moved by less has not moved
TRUSTED = 2  # steps of a size after which what they take is believed, whatever it is
BACKOFF, MOST_BACKOFF = 64, 2048  # steps
PROBE = 64  # steps after which drafts that do not seem to pay are verified once
OFTEN = 16  # plain steps, from the last drafts on, after each of which texts are looked at
FEW = 4  # rows of which that holds
SELDOM, STRIDE = 4, 8  # steps between two looks later on, and of more rows
LIKELIEST = 0.98
BESIDE = 24  # tokens that a grammar forced are rows like others; more are a prompt's chunk

# T(n) / T(1) of a step that reads quantised weights once, before it is measured.
_SHAPE = ((1, 1.0), (2, 1.1), (4, 1.25), (8, 1.5), (16, 2.9), (32, 5.7), (64, 11.3))
_MATCHES = (3, 5, 9, 17, 33)  # borders between the classes of how many tokens agree
_PRIORS = (0.15, 0.35, 0.6, 0.8, 0.9, 0.95)  # acceptance in each, before it is measured
DEPTHS = 8  # places of a model's chain that are told apart
MODEL_PRIOR = 0.6  # acceptance of a model's drafts, before it is measured
_WEIGHT = 4.0  # drafts that a prior counts as
_DECAY = 0.98  # of what was seen, with each draft


def usual(rows: int) -> float:
    """T(rows) / T(1) before it is measured."""
    place = bisect_left([at for at, _ in _SHAPE], rows)
    if place == len(_SHAPE):
        return _SHAPE[-1][1] * rows / _SHAPE[-1][0]
    if not place or _SHAPE[place][0] == rows:
        return _SHAPE[place][1]
    (low, below), (high, above) = _SHAPE[place - 1], _SHAPE[place]
    return below + (above - below) * (rows - low) / (high - low)


class Curve:
    """T(n) in seconds: medians of the last steps of each size, and lines between them. `version`: changes with them."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._known: dict[int, float] = {}
        self._sizes: list[int] = []  # that were measured, in their order
        self.count = self.version = 0

    def note(self, rows: int, seconds: float, guess: float | None = None) -> None:
        """`guess`: what was expected, where nothing was measured here."""
        seen = self._seen.setdefault(rows, deque(maxlen=KEPT))
        if len(seen) < TRUSTED:
            # The first steps of a size may record it, touch memory for the first time or meet a busy moment, and a size
            # that is thought too slow is not measured again.
            known = self.at(rows)
            guess = guess if known is None else known
            seconds = seconds if guess is None else min(seconds, LATE * guess)
        seen.append(seconds)
        self.count += 1
        now, before = statistics.median(seen), self._medians.get(rows)
        if before is not None and abs(now - before) <= SAME * before:
            return  # what follows from it need not be computed again
        if before is None:
            insort(self._sizes, rows)
        self._medians[rows] = now
        self._known.clear()
        self.version += 1

    def at(self, rows: int) -> float | None:
        """None: nothing was measured."""
        if not self._medians:
            return None
        found = self._medians.get(rows) or self._known.get(rows)
        if found is None:
            found = self._known[rows] = self._between(rows)
        return found

    def _between(self, rows: int) -> float:
        sizes, place = self._sizes, bisect_left(self._sizes, rows)
        if 0 < place < len(sizes):
            low, high = sizes[place - 1], sizes[place]
            share = (usual(rows) - usual(low)) / (usual(high) - usual(low))
            return self._medians[low] + share * (self._medians[high] - self._medians[low])
        nearest = sizes[0] if not place else sizes[-1]
        if place and len(sizes) > 1:
            # As if rows went on costing what they cost so far: where they cost more, one step tells.
            slope = (self._medians[nearest] - self._medians[sizes[0]]) / (nearest - sizes[0])
            return self._medians[nearest] + max(0.0, slope) * (rows - nearest)
        return self._medians[nearest] * usual(rows) / usual(nearest)

    @property
    def sizes(self) -> int:
        """How many were measured."""
        return len(self._medians)

    def trusted(self, rows: int) -> bool:
        return len(self._seen.get(rows, ())) > TRUSTED

    def near(self, rows: int) -> bool:
        """Whether a size within a quarter was measured."""
        place = bisect_left(self._sizes, 0.75 * rows)
        return place < len(self._sizes) and self._sizes[place] <= 1.34 * rows

    def facts(self) -> dict[str, float]:
        """Milliseconds by rows."""
        return {str(rows): round(1e3 * self._medians[rows], 3) for rows in sorted(self._medians)}


class Acceptance:
    """How often drafts count, by where they come from and how many tokens before them agree; those of a model by their
    place in the chain (`matched` below 0: the place is -1 - `matched`)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, bool, int], list[float]] = {}

    @staticmethod
    def _kind(matched: int) -> int:
        return bisect_left(_MATCHES, matched + 1) if matched >= 0 else max(matched, -DEPTHS)

    @staticmethod
    def alike(matched: int) -> int:
        """Of how many drafts behind one another, this one the first, acceptance is one number."""
        kind = bisect_left(_MATCHES, matched + 1)
        return _MATCHES[kind] - matched if kind < len(_MATCHES) else 1 << 30

    def of(self, source: str, sure: bool, matched: int) -> float:
        kind = self._kind(matched)
        found = self._seen.get((source, sure, kind))
        prior = MODEL_PRIOR if kind < 0 else _PRIORS[kind] * (1.0 if sure else 0.6)
        return prior if found is None else (found[0] + _WEIGHT * prior) / (found[1] + _WEIGHT)

    def note(self, source: str, sure: bool, matched: int, right: bool) -> None:
        found = self._seen.setdefault((source, sure, self._kind(matched)), [0.0, 0.0])
        found[0] = found[0] * _DECAY + right
        found[1] = found[1] * _DECAY + 1

    def facts(self) -> dict[str, float]:
        names = ("1-2", "3-4", "5-8", "9-16", "17-32", "33+")
        return {
            f"{source}{'' if sure else ' unsure'} {names[kind] if kind >= 0 else -kind}": round(found[0] / found[1], 3)
            for (source, sure, kind), found in sorted(self._seen.items())
        }


@dataclass(slots=True)
class Chain:
    """Drafts of a row as the controller sees them (see `drafters.Draft`), and its request's record. `modelled`: a model
    will make them, so that each place of the longest chain takes a pass of it. `deep`: as a tree, in the order of how
    likely they are to it, at most so many behind one another; 0: as a chain. `once`: in one pass, however many."""

    length: int
    source: str
    matched: int
    sure: bool
    tally: Tally
    modelled: bool = False
    deep: int = 0
    once: bool = False

    def passes(self, drafts: int) -> int:
        """Of the model, for so many of them."""
        if self.once:
            return min(drafts, 1)
        return min(drafts, self.deep) if self.deep else drafts

    def match(self, depth: int) -> int:
        """What `Acceptance` tells the draft at this depth by."""
        return -1 - depth if self.modelled else self.matched + depth


@dataclass(slots=True)
class Ledger:
    """What steps with drafts took, and what plain ones would have taken for the same tokens."""

    spent: float = 0.0
    saved: float = 0.0
    steps: int = 0


@dataclass(slots=True)
class _Kind:
    """Times of steps whose tokens are chosen in one way."""

    plain: Curve = field(default_factory=Curve)
    verify: Curve = field(default_factory=Curve)
    # What `takes` has found, and the versions of both then.
    expected: dict[int, float | None] = field(default_factory=dict[int, float | None])
    stamp: tuple[int, int] = (0, 0)

    def takes(self, rows: int) -> float | None:
        """What a step of so many rows would take, not planned ahead; None: nothing was measured."""
        stamp = self.plain.version, self.verify.version
        if stamp != self.stamp:
            self.stamp = stamp
            self.expected.clear()
        if rows in self.expected:
            return self.expected[rows]
        if self.verify.near(rows) or (self.verify.sizes > 1 and not self.plain.near(rows)):
            found = self.verify.at(rows)
        else:
            plain = self.plain.at(rows)
            found = plain if plain is None else 1.05 * plain
        self.expected[rows] = found
        return found


class Controller:
    """Decides for one engine. Not thread-safe.

    Args:
        most: drafts of a row, at most.
        rows: rows of one token in a step that verifies, at most.
        adaptive: False: whatever is drafted is verified, always.
        share: of a plain step's time, what a pass of the model that drafts is thought to take until one is measured.
    """

    def __init__(self, most: int, rows: int, adaptive: bool = True, share: float = 0.0) -> None:
        self.on = not adaptive
        self.acceptance = Acceptance()
        self.times: dict[bool, _Kind] = {True: _Kind(), False: _Kind()}
        self._most, self._rows, self._adaptive = most, rows, adaptive
        self._share, self._passes = share, deque[float](maxlen=9)  # seconds of a pass
        self._pass: float | None = None  # their median
        self._ledger = Ledger()
        self._since = 0  # plain steps since something was verified
        self._looked = 0  # how many there were when texts were looked at last
        self._rest = 0  # of which so many are to pass
        self._wary = 0  # plain steps for which drafts have to promise more
        self._backoff = BACKOFF
        self._quiet = 0
        self.probing = False
        self.stopped = 0  # times that it did not pay

    # what happened

    def plain(self, rows: int, easy: bool, seconds: float, steps: int = 1) -> None:
        """The last of `steps` steps of `rows` decodes, planned ahead, has taken so long."""
        self.times[easy].plain.note(rows, seconds)
        self._since += steps
        self._wary = max(0, self._wary - steps)

    def skips(self, rows: int) -> int:
        """Of how many plain steps nothing need be told: while others compute, Python takes their cores, and the less
        often it runs the longer each turn takes."""
        if self._since < OFTEN or self.on:
            return 0
        return (STRIDE if rows > FEW else SELDOM) - 1

    def verified(
        self, rows: int, total: int, easy: bool, tokens: int, seconds: float, passes: int = 0, drafting: float = 0.0
    ) -> None:
        """A step of `rows` decodes, `total` with their drafts, not planned ahead, has given so many tokens. Of its
        seconds `drafting` were those of a model's `passes`."""
        kind = self.times[easy]
        kind.verify.note(total, seconds - drafting, kind.takes(total))
        if passes:
            self._passes.append(drafting / passes)
            self._pass = statistics.median(self._passes)
        plain = kind.plain.at(rows)
        if plain is None or not self._adaptive:
            return
        ledger, alone = self._ledger, kind.verify.at(total)
        assert alone is not None
        took = seconds - drafting
        ledger.spent += drafting + (min(took, LATE * alone) if kind.verify.trusted(total) else took)
        ledger.saved += plain * tokens / rows
        ledger.steps += 1
        if ledger.spent - ledger.saved > LOSS * plain:
            self._stop()
            self._ledger = Ledger()
        elif ledger.steps >= LEDGER and ledger.saved > ledger.spent:
            self._backoff = BACKOFF
            self._ledger = Ledger()
        if self.probing:
            self._off(0)

    def judged(self, chain: Chain, verified: int, right: int) -> None:
        """Of a row's first `verified` drafts the first `right` were accepted."""
        for depth in range(min(verified, right + 1)):
            sure = chain.sure or depth > 0
            expected = self.acceptance.of(chain.source, sure, chain.match(depth))
            self.acceptance.note(chain.source, sure, chain.match(depth), depth < right)
            tally = chain.tally
            tally.right = tally.right * _DECAY + (depth < right)
            tally.expected = tally.expected * _DECAY + expected

    def judged_tree(self, chain: Chain, verified: int, right: Sequence[int]) -> None:
        """Of the first `verified` drafts of a row's tree those at these places were accepted."""
        kept, tally = set(right), chain.tally
        for place in range(verified):
            expected = self.acceptance.of(chain.source, chain.sure, chain.match(place))
            self.acceptance.note(chain.source, chain.sure, chain.match(place), place in kept)
            tally.right = tally.right * _DECAY + (place in kept)
            tally.expected = tally.expected * _DECAY + expected

    # what to do

    def looks(self, rows: int, easy: bool) -> bool:
        """Whether texts are to be looked at after a plain step: drafts might pay."""
        if self.on or self._since < self._rest or 3 * rows > self._rows:
            return False
        if self.times[easy].plain.count < ENOUGH:
            return False
        passed = self._since - self._looked
        return passed >= STRIDE if rows > FEW else self._since < OFTEN or passed >= SELDOM

    def look(self, chains: Sequence[Chain | None], easy: bool) -> None:
        """These may be drafted next: verify from the next step on, if that pays, or if it has not been tried long."""
        rows, self._looked = len(chains), self._since
        if any(self._best(chains, rows, easy, max(BEGIN, self._margin))):
            self._begin(False)
        elif self._since >= max(PROBE, self._rest) and any(
            (chain is not None and chain.modelled) or self._survival(chain)[:1] > [0.5] for chain in chains
        ):
            self._begin(True)

    def lengths(self, chains: Sequence[Chain | None], easy: bool, beside: int = 0) -> list[int]:
        """How many drafts of each decoding row are verified in this step; `beside`: the step's other tokens."""
        if not self._adaptive:
            return self._all(chains, beside)
        if beside > BESIDE:
            return self._beside(chains, easy)
        found = self._best(chains, len(chains), easy, 0.0 if self.probing else self._margin, beside)
        self._quiet = 0 if any(found) else self._quiet + 1
        if self._quiet >= QUIET:
            self._off(0)
        return found

    def facts(self) -> dict[str, Any]:
        """For people."""
        times = {
            f"{'greedy' if easy else 'other'} {name}": curve.facts()
            for easy, kind in self.times.items()
            for name, curve in (("plain", kind.plain), ("verify", kind.verify))
            if curve.count
        }
        facts = {"on": self.on, "stopped": self.stopped, "step_ms": times, "acceptance": self.acceptance.facts()}
        return facts if self._pass is None else {**facts, "pass_ms": round(1e3 * self._pass, 3)}

    # how

    @property
    def _margin(self) -> float:
        return WARY if self._wary else MARGIN

    def _begin(self, probing: bool) -> None:
        self.on, self.probing, self._quiet = True, probing, 0

    def _off(self, rest: int) -> None:
        self.on, self.probing, self._quiet, self._since, self._rest = False, False, 0, 0, rest
        self._looked = 0

    def _stop(self) -> None:
        self.stopped += 1
        # The first loss is no reason to leave what is nearly certain; a second one soon after it is, and so is any of a
        # model, whose passes are lost too.
        self._off(self._backoff if self._share or self._wary else 0)
        self._wary = self._backoff
        # Drafts of a model cost most where they are wrong: they rest longer.
        self._backoff = min((4 if self._share else 2) * self._backoff, MOST_BACKOFF)

    def _all(self, chains: Sequence[Chain | None], beside: int) -> list[int]:
        left = self._rows - len(chains)
        left -= beside if beside <= left else 0  # a step of a prompt has other bits anyway
        each = max(0, left // max(1, len(chains)))
        return [0 if chain is None else min(chain.length, each) for chain in chains]

    def _survival(self, chain: Chain | None) -> list[float]:
        """Of each draft of a row, how likely it counts."""
        if chain is None:
            return []
        tally, share, found = chain.tally, 1.0, list[float]()
        factor, length = (tally.right + _WEIGHT) / (tally.expected + _WEIGHT), min(chain.length, self._most)
        while len(found) < length:
            depth = len(found)
            known = self.acceptance.of(chain.source, chain.sure or depth > 0, chain.match(depth))
            likely = min(LIKELIEST, known * factor)
            # Of a tree that is how often the draft itself was right, and none is likelier than those before it.
            share = min(share, likely) if chain.deep else share * likely
            found.append(share)
            if depth and not chain.modelled:  # those behind it are thought as likely, as far as as many tokens agree
                for _ in range(min(length - depth, self.acceptance.alike(chain.match(depth))) - 1):
                    share *= likely
                    found.append(share)
        return found

    def _best(self, chains: Sequence[Chain | None], rows: int, easy: bool, margin: float, beside: int = 0) -> list[int]:
        none = [0] * len(chains)
        kind = self.times[easy]
        plain = kind.plain.at(rows + beside)
        if plain is None or not rows:
            return none
        survival = [self._survival(chain) for chain in chains]
        if rows == 1 and not (chains[0] is not None and chains[0].modelled):
            return [_prefix(survival[0], kind, 1 + beside, 1.0 / plain * margin, self._rows)]
        heap = [(-shares[0], row) for row, shares in enumerate(survival) if shares]
        heapq.heapify(heap)
        one, modelled = 0.0, next((chain for chain in chains if chain is not None and chain.modelled), None)
        if modelled is not None:
            one = self._pass_seconds(plain)
        found, count, tokens = none, list(none), float(rows)
        best, total = rows / plain * margin, rows + beside
        while heap and total < self._rows:
            share, row = heapq.heappop(heap)
            tokens, total = tokens - share, total + 1
            count[row] += 1
            if count[row] < len(survival[row]):
                heapq.heappush(heap, (-survival[row][count[row]], row))
            takes = kind.takes(total)
            if takes is None:
                continue
            takes += one * (0 if modelled is None else modelled.passes(max(count)))
            if tokens / takes > best:
                best, found = tokens / takes, list(count)
        return found

    def _pass_seconds(self, plain: float) -> float:
        """What each place of a model's chain takes."""
        return self._share * plain if self._pass is None else self._pass

    def _beside(self, chains: Sequence[Chain | None], easy: bool) -> list[int]:
        """Beside a prompt, where every row adds its computation: drafts that give more than that takes; none of a
        model, whose passes come on top."""
        rows = len(chains)
        plain, more, less = (self.times[easy].plain.at(size) for size in (rows, 16, 8))
        modelled = any(chain is not None and chain.modelled for chain in chains)
        if plain is None or more is None or less is None or modelled:
            return [0] * rows
        least = 1.1 * (more - less) / 8 / (plain / rows)
        each = (self._rows - rows) // max(1, rows)
        return [sum(1 for share in self._survival(chain)[: max(0, each)] if share > least) for chain in chains]


def _prefix(shares: Sequence[float], kind: _Kind, rows: int, best: float, most: int) -> int:
    """How many of the drafts of the only row that decodes, in a step of `rows` without them, give the most tokens a
    second, if that is more than `best`. What `Controller._best` finds for several rows."""
    tokens, found = 1.0, 0
    for count, share in enumerate(shares[: max(0, most - rows)], 1):
        tokens += share
        takes = kind.takes(rows + count)
        if takes is not None and tokens > best * takes:
            best, found = tokens / takes, count
    return found
