"""What a step is made of, as pure decisions: slots' arrays, a queue, pages and tokens as numbers in, chunks out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import NDArray

    from phloem.core.batch import Batch, Follower
    from phloem.kvcache.manager import Given
    from phloem.scheduler.chunks import Price
    from phloem.scheduler.state import Request, Slots

KEPT = 4  # a prompt that goes on leaves 1 / KEPT of a step to those that wait
LONG = 4  # steps of which all a prompt would need: one that needs more leaves that part to shorter ones too
FORCED = 32  # tokens of a chunk behind which drafts stand, at most (see also `Pace.forced`)
HORIZON = 1024  # output tokens of a running request that admission looks ahead to, at most


@dataclass(frozen=True, slots=True)
class Pace:
    """How many prompt tokens a step takes, and how many drafts a decoding row may have."""

    budget: int  # tokens of a step, decodes included
    mixed: int  # prompt tokens of a step that also decodes: running requests wait for it
    worthwhile: int  # prompt tokens from which on another prompt makes a step no more efficient
    draft_room: int = 0
    whole: bool = False  # prompts are not divided: each is computed in one step
    # Rows of a step that have the bits of one alone, at most: what grammars forced is cut where it would make more of
    # it, beside the decodes. 0: any number.
    forced: int = 0
    # Steps that the runner has on their way at a time, where it has stages: the rows that decode are dealt out among so
    # many, and a row is in one of them. 1: a row's next step may be launched before its token is known.
    waves: int = 1
    price: Price | None = None  # where tokens of a prompt cost the more, the more are before them; None: they do not


@dataclass(slots=True)
class Headroom:
    """Which share of the tokens still to come must fit before one more request is admitted. Preemptions raise it."""

    share: float = 0.3
    low: float = 0.1

    def preempted(self) -> None:
        self.share = min(1.0, self.share + 0.15)

    def relax(self) -> None:
        self.share = max(self.low, self.share - 0.002)


@dataclass(slots=True)
class Refusal:
    """A request that planning found impossible, or that failed while it was planned."""

    request: Request
    message: str
    status_code: int


@dataclass(slots=True)
class Plan:
    """A batch and what the scheduler must know of it."""

    batch: Batch
    rows: list[Request]
    prefills: Sequence[Request] = ()  # the rows after the decodes
    entered: Sequence[Request] = ()  # of these, those that take a slot with this step
    followers: Sequence[tuple[int, Follower]] = ()  # by slot, for launch
    steady: bool = False  # the rows of the step before it, one token on: nothing ends, nothing enters the tree
    scored: set[int] = field(default_factory=set)  # rows that end a request without sampling
    mark: int = 0  # of the cache, at launch
    given: list[Given] = field(default_factory=list)  # pages that the launch gave to the tree


@dataclass(slots=True)
class Chunk:
    """New tokens of a request: `count` of its known ones from `start` on.

    A waiting request is one without a count, behind the tokens that the cache has in whole pages.
    """

    request: Request
    known: NDArray[np.int32]
    start: int
    count: int = 0
    pages: int = 0  # that a waiting request needs for its known tokens, beside those in the cache
    growth: int = 0  # output tokens to come, of a waiting request
    room: int = 0  # drafts that may stand behind it, where it is what a grammar forced
    canvas: int = 0  # places of a canvas that stands behind it (`scheduler/blocks.py`)
    part: int = 0  # the group of ranks that a waiting request is attended to by (`scheduler/attention_groups.py`)
    sharable: bool = False  # whether the page after the cached ones could come from the cache


@dataclass(slots=True)
class Means:
    """What a step may spend. `resting`: slots that sit it out. `share`: of the output to come, what must fit."""

    pace: Pace
    most: int  # tokens, however much the pace allows: memory is short
    pages: int
    entries: int  # requests that may enter a slot
    queued: bool  # whether any waits to
    share: float = 0.0
    resting: Collection[int] = ()


@dataclass(slots=True)
class Spent:
    """The order of a step: decodes, then chunks of running requests, then first chunks of waiting ones.

    With `lacking` (these have no pages, the last of them first) nothing else is said.
    """

    decodes: NDArray[np.int32]  # slots
    needy: NDArray[np.int32]  # of these, the slots that lack a page
    room: NDArray[np.int32] | None = None  # [decodes] drafts that each may have
    chunks: list[Chunk] = field(default_factory=list)
    entries: list[Chunk] = field(default_factory=list)
    promised: int = 0  # pages that running requests will want beyond this step
    lacking: list[Request] = field(default_factory=list)


def spend(slots: Slots, waiting: Iterable[Chunk], means: Means) -> Spent:
    """Decide what the next step computes. Takes from `waiting` only as many as it must look at, and gives those that
    enter a count; changes nothing else."""
    active = slots.active()
    if means.resting:
        active = active[[slot not in means.resting for slot in active.tolist()]]
    todo = slots.length[active] - slots.computed[active]
    decodes = active[todo == 1]
    if len(decodes) > means.most:  # while memory is short: the others sit out with their pages
        decodes = np.array(sorted(_by_place(slots, decodes)[: means.most]), dtype=np.int32)
    if means.pace.waves > 1:
        decodes = decodes[: -(-_decoding(slots) // means.pace.waves)]
    needy = decodes[slots.computed[decodes] >= slots.covered[decodes]]
    spent = Spent(decodes, needy)
    if slots.paged[0] and len(needy) > means.pages:
        spent.lacking = [slots.at(slot) for slot in reversed(_by_place(slots, needy)[means.pages :])]
        return spent
    pages = means.pages - len(needy) if slots.paged[0] else means.pages
    pace = means.pace
    purse = _Purse(min(pace.budget, means.most), pages, slots.page_size, slots.paged[0], pace.whole)
    purse.price = pace.price
    purse.bounds, purse.forced = len(decodes) < pace.forced, pace.forced - len(decodes)
    if len(decodes):
        # With every slot decoding there must be a token for each, or the last ones would starve.
        purse.left = min(max(purse.left - len(decodes), 0), means.pace.mixed)
    prefills = _by_place(slots, active[todo > 1]) if len(decodes) < len(active) else []
    purse.long = LONG * purse.left
    short = [slot for slot in prefills if slots.length[slot] - slots.computed[slot] <= purse.long]
    queued = bool(means.entries and means.queued)
    wanted = bool(prefills) and (queued or 0 < len(short) < len(prefills)) and not means.pace.whole
    kept = purse.left // KEPT if wanted else 0
    purse.left -= kept
    reached = _go_on(spent, slots, prefills, purse)
    if spent.lacking:
        return spent
    purse.left += kept
    if kept and any(slot not in short for slot in prefills[:reached]):
        _go_on(spent, slots, [slot for slot in prefills[reached:] if slot in short], purse)
        if spent.lacking:
            return spent
    if means.entries and means.queued and purse.left > 0:
        _let_in(spent, slots, waiting, means, purse)
    # What was kept for others and not wanted goes to the first prompt.
    if spent.chunks and purse.left > 0 and not purse.whole:
        _lengthen(spent.chunks[0], slots, purse)
    if means.pace.draft_room:
        _give_room(spent, slots, means, purse)
    return spent


def _decoding(slots: Slots) -> int:
    """Rows that decode, those whose token is still to come among them."""
    staying = slots.staying()
    return int((slots.length[staying] - slots.computed[staying] == 1).sum())


def page_after(known: NDArray[np.int32], start: int, size: int, namespace: str) -> tuple[str, int, bytes]:
    """What is computed next, for a quick comparison: whoever shares a prefix of so many tokens has the same."""
    return namespace, start, known[start : start + size].tobytes()


@dataclass(slots=True)
class _Purse:
    left: int  # tokens
    pages: int
    size: int
    paged: bool  # else these are states, of which a request takes all it ever needs when it enters
    whole: bool = False  # see `Pace`; the first of a step may be longer than what there is
    forced: int = 0  # tokens that grammars forced, as far as the step keeps within `Pace.forced`
    bounds: bool = False  # whether `forced` holds: with a prompt's chunk, or so many decodes, the step has more anyway
    long: int = 0  # tokens of a prompt beyond which it is a long one
    used: bool = False
    price: Price | None = None  # of tokens of prompts; `left` counts such as have nothing before them

    def room(self, start: int) -> int:
        """Tokens from `start` on that can be paid."""
        return self.left if self.price is None else self.price.most(self.left, start)

    def pay(self, start: int, count: int) -> None:
        """For so many tokens from `start` on."""
        self.left = self.left - count if self.price is None else self.price.left(self.left, start, count)

    def chunk(self, start: int, todo: int, covered: int) -> int:
        """Of `todo` tokens from `start` on, those that can be paid; they are."""
        count = min(todo, self.room(start))
        if self.whole and count < todo:
            if self.used:
                return 0
            count = todo
        self.used = True
        if self.paged:
            count = min(count, covered + max(0, self.pages) * self.size - start)
            self.pages -= max(0, -(-(start + count - covered) // self.size))
        self.pay(start, max(0, count))
        return count


def _by_place(slots: Slots, some: NDArray[np.int32]) -> list[int]:
    """Slots, those whose requests come first in front."""
    return sorted(some.tolist(), key=lambda slot: slots.at(slot).place)


def _go_on(spent: Spent, slots: Slots, prefills: list[int], purse: _Purse) -> int:
    """Prompts that have begun, one after the other; how many of them were looked at. The next one may have no pages:
    then it is lacking."""
    for at, slot in enumerate(prefills):
        if purse.left <= 0:
            return at
        request, start = slots.at(slot), int(slots.computed[slot])
        todo = int(slots.length[slot]) - start
        if start + 1 < slots.forced[slot]:
            purse.bounds = False
        elif purse.bounds and purse.forced <= 0:
            continue  # one of the next steps has room for it
        elif purse.bounds:
            todo = min(todo, purse.forced)
        count = purse.chunk(start, todo, int(slots.covered[slot]))
        purse.forced -= count
        if count <= 0 and purse.whole:
            continue  # one of the next steps has room for it
        if count <= 0:
            spent.lacking = [request]
            return at
        spent.chunks.append(Chunk(request, request.known, start, count))
    return len(prefills)


def _let_in(spent: Spent, slots: Slots, waiting: Iterable[Chunk], means: Means, purse: _Purse) -> None:
    """Waiting requests whose prompts, and a share of whose output, have pages beside what the running ones will want.

    Beside a prompt that goes on only those enter that end in this step; beside long ones alone, also one that is not
    long. One whose next page is computed in this very
    step waits for it. None overtakes one that has no pages, or a long prompt would never run.
    """
    size, entries, budget = slots.page_size, means.entries, purse.left
    begun, alone = bool(spent.chunks), slots.num_running == 0
    beside = not purse.whole and all(_is_long(chunk, slots, purse) for chunk in spent.chunks)
    promised = spent.promised = promised_to(slots, slots.staying(), means.share) - (means.pages - purse.pages)
    computing: dict[tuple[str, int, bytes], NDArray[np.int32]] = {}
    for chunk in spent.chunks:
        shared = slots.lease(chunk.request.slot).shared * size
        computing[page_after(chunk.known, shared, size, chunk.request.namespace)] = chunk.known
    waiting = iter(waiting)
    while purse.left > 0 and entries and (begun or budget - purse.left < means.pace.worthwhile):
        want = next(waiting, None)
        if want is None:
            break
        rest, room = len(want.known) - want.start, purse.room(want.start)
        if rest > room and ((begun and not (beside and rest <= purse.long)) or (purse.whole and purse.used)):
            continue
        page = page_after(want.known, want.start, size, want.request.namespace)
        if want.sharable and page in computing:
            same = want.start + size
            if np.array_equal(computing[page][:same], want.known[:same]):
                continue
        if not alone and want.pages > purse.pages - promised:
            break
        want.count = rest if purse.whole else min(rest, room)
        purse.used = True
        spent.entries.append(want)
        purse.pay(want.start, want.count)
        purse.pages -= want.pages
        promised += -(-int(want.growth * means.share) // size)
        computing[page] = want.known
        entries, alone = entries - 1, False


def _is_long(chunk: Chunk, slots: Slots, purse: _Purse) -> bool:
    return int(slots.length[chunk.request.slot]) - chunk.start > purse.long


def promised_to(slots: Slots, staying: NDArray[np.int32], share: float) -> int:
    """Pages that these running requests will want: the rest of their prompts, and a share of the output to come."""
    if not len(staying) or not slots.paged[0]:
        return 0
    length = slots.length[staying]
    missing = np.maximum(0, -(-(length - slots.covered[staying]) // slots.page_size))
    still = np.minimum(np.minimum(slots.limit[staying], slots.growing) - length, HORIZON)
    growth = int(np.maximum(still, 0).sum() * share)
    return int(missing.sum()) + -(-growth // slots.page_size)


def _lengthen(chunk: Chunk, slots: Slots, purse: _Purse) -> None:
    slot, at = chunk.request.slot, chunk.start + chunk.count
    if purse.bounds and at >= slots.forced[slot]:
        return
    covered = max(int(slots.covered[slot]), -(-at // purse.size) * purse.size)
    chunk.count += max(0, purse.chunk(at, int(slots.length[slot]) - at, covered))


def _forced(chunk: Chunk, slots: Slots) -> bool:
    """Whether the chunk ends with the last known token of an answer that has begun: a grammar forced the last ones."""
    slot = chunk.request.slot
    ends = chunk.start + chunk.count == slots.length[slot]
    return bool(ends and slots.samples[slot]) and chunk.start >= chunk.request.num_prompt and chunk.count <= FORCED


def _give_room(spent: Spent, slots: Slots, means: Means, purse: _Purse) -> None:
    """Drafts take what prompts leave: tokens in equal parts, and pages that nobody has to give up."""
    at = spent.decodes
    used = len(at) + sum(chunk.count for chunk in (*spent.chunks, *spent.entries))
    forced = [chunk for chunk in spent.chunks if _forced(chunk, slots)]
    if not len(at) and not forced:
        return
    each = min(means.pace.draft_room, (min(means.pace.budget, means.most) - used) // (len(at) + len(forced)))
    for chunk in forced:
        slot = chunk.request.slot
        chunk.room = max(0, min(each, int(slots.limit[slot] - slots.length[slot]) - 1))
    room = np.clip(slots.limit[at] - slots.length[at] - 1, 0, max(each, 0))
    ends = slots.computed[at] + 1
    covered = np.where(ends > slots.covered[at], slots.covered[at] + slots.page_size, slots.covered[at])
    more = -(-np.maximum(ends + room - covered, 0) // slots.page_size)
    if slots.paged[0] and more.sum() > purse.pages - spent.promised:
        room = np.minimum(room, covered - ends)
    if room.any():
        spent.room = room.astype(np.int32)
