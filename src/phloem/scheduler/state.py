"""What the scheduler keeps of each request, and the slots of the running ones as arrays.

Words used throughout: a request has `length` tokens, the last of which may still be *in flight* (sampled by a launched
step, value unknown to the host); of these, `computed` have their KV written by launched steps. Computed chases length:
whoever has `length - computed` > 0 wants that many new tokens in the next step. A fresh prompt, a prefix hit, the next
chunk, the return after a preemption and a decode (difference 1) are all this one case.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from phloem.core.batch import FROM_DEVICE, PositionLogprobs
from phloem.core.messages import Logprobs, Submit, unpack_ids
from phloem.core.request import RequestStatus, SamplingParams
from phloem.scheduler.routed import Routed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.core.adapters import Lent
    from phloem.core.batch import Admission, Follower
    from phloem.core.late import Constraint, Late
    from phloem.core.memory import Group
    from phloem.core.messages import Did
    from phloem.kvcache.manager import Lease

# Why a slot sits out: the step in flight decides what comes next; or something late has not come.
STEP, LATE = 1, 2
_ALL = np.iinfo(np.int32).max


@dataclass(slots=True, eq=False)
class Request:
    """One request, from `Submit` to its last chunk."""

    submit: Submit
    received: float
    id: str = field(init=False)
    params: SamplingParams = field(init=False)
    prompt: NDArray[np.int32] = field(init=False)
    num_prompt: int = field(init=False)
    known: NDArray[np.int32] = field(init=False)  # what was known when it last entered a slot
    wants_prompt: bool = field(init=False)
    targets_from: int = field(init=False)  # first prompt position whose logprob is not launched yet
    plain: bool = field(init=False)  # nothing but its tokens is told of a step, and nothing is done with them
    namespace: str = ""  # of the cache
    output: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    key: float = 0.0  # place in the queue; smaller runs earlier and is preempted later
    due: float = 0.0  # when its first token was promised
    itl: float = 0.0  # seconds between two tokens that it was promised; 0: none
    late: bool = False  # it has given way to those that can still be in time
    charged: float = -1.0  # output tokens that its client has been charged; -1: it was not admitted yet
    seq: int = 0
    limit: int = 0  # length at which it surely ends
    stops: frozenset[int] = frozenset()
    seed: int = 0
    slot: int = -1
    lease: Lease | None = None
    inflight: int = 0  # launched steps that yield tokens whose values are not known yet
    waits: tuple[Late, ...] = ()  # while there are any, it is not launched
    constraint: Constraint | None = None
    adapter: Lent | None = None
    whole: tuple[tuple[int, int], ...] = ()  # first and behind last of tokens that one step computes together
    held_back: int = 0  # times that it was passed over because of its adapter
    admitted: float = -1.0
    cached_tokens: int = 0
    cached_host: int = 0  # of these, copied from host memory, and from a store
    cached_storage: int = 0
    handed: bool = False  # another server computed its prompt, and drew its first token
    match_pages: int = 0
    match_version: int = -1
    passed_mark: int = -1  # admissions seen when it came into the policy's window
    # Tuples where most requests have none: a list each would be one more thing for the garbage collector to visit.
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    fresh: list[int] = field(default_factory=list)  # tokens not sent yet
    fresh_logprobs: tuple[PositionLogprobs, ...] = ()
    fresh_hidden: tuple[bytes, ...] = ()
    routed: Routed | None = None
    unshared: bool = False  # nothing of it may come from the cache: the experts of its tokens would not be known
    pooled: bytes = b""
    did: list[Did] | None = None  # of a traced request
    sent: bool = False
    message: int = -1  # the message that its last chunk is in
    jumped: int = 0  # tokens of the output that a grammar forced
    drafted: int = 0  # drafts that were verified
    passes: int = 0  # of its canvases
    right: list[int] = field(default_factory=list)  # [n]: steps of which n drafts were accepted

    def __post_init__(self) -> None:
        submit, start = self.submit, self.submit.logprob_start
        self.id, self.params, self.namespace = submit.id, submit.sampling, submit.namespace
        self.prompt = self.known = unpack_ids(submit.input_ids)
        self.num_prompt = len(self.prompt)
        self.wants_prompt = submit.return_logprob and start >= 0
        self.targets_from = max(start, 1)
        self.did = [] if submit.traced else None
        self.routed = Routed() if submit.return_routed else None
        asks = submit.return_logprob or submit.return_hidden or submit.return_routed or submit.pooled
        self.plain = not asks and submit.align is None

    @property
    def place(self) -> tuple[float, int]:
        """Who has a smaller one runs earlier and is preempted later."""
        return self.key, self.seq

    @property
    def scores_only(self) -> bool:
        return self.params.max_new_tokens == 0

    @property
    def first_target(self) -> int:
        """The first prompt position that has, and wants, a logprob."""
        return max(self.submit.logprob_start, 1)

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def all_known(self) -> NDArray[np.int32]:
        """Prompt and output so far, int32."""
        if not self.output:
            return self.prompt
        return np.concatenate([self.prompt, np.asarray(self.output, dtype=np.int32)])

    def match_limit(self) -> int:
        """How many leading tokens may come from the cache: one is always computed, and so is each wanted logprob.

        The logprob of position i is read from the hidden state at i - 1.
        """
        if self.unshared:
            return 0
        limit = self.num_prompt + len(self.output) - 1
        if self.wants_prompt and self.targets_from < self.num_prompt:
            limit = min(limit, self.targets_from - 1)
        return limit

    def uncut(self, start: int, count: int, *, more: bool) -> int:
        """How many tokens from `start` on a step computes that should compute `count`: it ends in no part that must
        stay together, but before it; where it begins with one, behind it, if it may be `more`, or with nothing."""
        end = start + count
        for first, last in self.whole:
            if first < end < last:
                end = first if first > start else last if more else start
        return end - start

    def admit(self, now: float) -> None:
        """It is in a step: when that was for the first time counts."""
        if self.admitted < 0:
            self.admitted = now

    def forget_inflight(self) -> None:
        """The steps in flight are dropped: what they have of this request must be launched again."""
        self.inflight = 0
        self.targets_from = self.first_target + len(self.prompt_logprobs)


def pack_logprobs(items: Sequence[PositionLogprobs], submit: Submit) -> Logprobs:
    return Logprobs(
        values=[item.token for item in items],
        top=[item.top for item in items] if submit.top_logprobs else [],
        chosen=[item.chosen for item in items] if submit.token_ids_logprob else [],
    )


class Entry(NamedTuple):
    """A request that the runner is told of."""

    admission: Admission
    follower: Follower | None


class Slots:
    """The running requests by slot. Tables are rows of one array a group, so that a batch gathers them in one call.

    A slot is *active* while its request may be launched. One that will surely end with a launched step has left
    `active` but keeps slot and pages until that step is committed; one that is *held* sits out and comes back.
    `most_tokens`: of a request, those that are ever in memory; `block`: of a model of diffusion, known tokens that are
    computed together; `canvas`: places of a canvas, 0: a block. `parts`: groups of ranks that attend to rows of their
    own; slot s is of part s % parts, and so is what its lease has.
    """

    def __init__(
        self,
        count: int,
        most_tokens: int,
        page_size: int,
        groups: Sequence[Group],
        block: int = 0,
        canvas: int = 0,
        parts: int = 1,
    ) -> None:
        self.parts = parts
        self.count, self.block, self.canvas = count, block, canvas or block
        self.page_size = page_size
        self.requests: list[Request | None] = [None] * count
        self.paged = tuple(group.kind == "pages" for group in groups)
        self.windows = tuple(group.window for group in groups if group.window)
        widths = [-(-most_tokens // page_size) if paged else 2 for paged in self.paged]
        self.tables = tuple(np.zeros((count, width), dtype=np.int32) for width in widths)
        self._rows = [tuple(table[slot] for table in self.tables) for slot in range(count)]
        # Beyond so many tokens a request holds no more pages of the first group: it has a window, or needs none.
        self.growing = groups[0].window + page_size if groups[0].window else _ALL if self.paged[0] else 0
        self.moved = False  # whether tables of launched rows have changed since `gather`, other than by growing
        self.computed = np.zeros(count, dtype=np.int32)
        self.length = np.zeros(count, dtype=np.int32)
        self.limit = np.zeros(count, dtype=np.int32)
        self.covered = np.zeros(count, dtype=np.int32)  # positions that the lease has pages for
        self.next_token = np.full(count, FROM_DEVICE, dtype=np.int32)
        self.samples = np.zeros(count, dtype=np.bool_)
        self.forced = np.full(count, _ALL, dtype=np.int32)  # the first position of what a grammar forced last
        self.itl = np.full(count, np.inf, dtype=np.float32)  # seconds between tokens that were promised
        self.adapter = np.zeros(count, dtype=np.int32)  # the entry of each slot's adapter; 0: none
        self.num_adapted = 0  # slots with one
        # Active slots that the runner must be told of again.
        self.readmit: dict[int, Entry] = {}
        self._free = [list(range(count - 1, -1, -1))[parts - 1 - part :: parts] for part in range(parts)]
        self._active: dict[int, Request] = {}
        self._held: dict[int, int] = {}  # slot -> why, as bits
        self._active_array: NDArray[np.int32] | None = None

    @property
    def num_free(self) -> int:
        return sum(len(free) for free in self._free)

    @property
    def num_running(self) -> int:
        return self.count - self.num_free

    @property
    def num_ending(self) -> int:
        """Slots that are only kept until their last step is committed."""
        return self.num_running - len(self._active)

    @property
    def any_held(self) -> bool:
        return bool(self._held)

    def num_held(self, why: int) -> int:
        return sum(1 for bits in self._held.values() if bits & why) if self._held else 0

    def free_of(self, part: int) -> int:
        """Free slots of a part."""
        return len(self._free[part])

    def num_in(self, part: int) -> int:
        """Slots of a part that are taken."""
        return self.count // self.parts - len(self._free[part])

    def part_of(self, slots: NDArray[np.int32]) -> NDArray[np.int32]:
        """Of which part each slot is."""
        return slots % np.int32(self.parts)

    def next_free(self, part: int = 0) -> tuple[NDArray[np.int32], ...]:
        """The tables of the slot that `enter` will take for a lease of this part."""
        return self._rows[self._free[part][-1]]

    def active(self) -> NDArray[np.int32]:
        """Slots that may be launched now, in order of admission, int32."""
        if self._active_array is None:
            slots = [slot for slot in self._active if slot not in self._held] if self._held else list(self._active)
            self._active_array = np.array(slots, dtype=np.int32)
        return self._active_array

    def staying(self) -> NDArray[np.int32]:
        """Slots that will be launched again, now or later, int32."""
        return np.array(list(self._active), dtype=np.int32) if self._held else self.active()

    def active_requests(self) -> list[Request]:
        """Of those that will be launched again."""
        return list(self._active.values())

    def running(self) -> list[Request]:
        return [request for request in self.requests if request is not None]

    def at(self, slot: int) -> Request:
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is empty"
        return request

    def lease(self, slot: int) -> Lease:
        lease = self.at(slot).lease
        assert lease is not None, f"slot {slot} has no lease"
        return lease

    def gather(self, slots: NDArray[np.int32], tokens: int) -> tuple[NDArray[np.int32], ...]:
        """For a batch: the tables of these rows, the longest of which has so many tokens with its new ones."""
        self.moved = False
        pages = -(-tokens // self.page_size)
        groups = zip(self.tables, self.paged, strict=True)
        return tuple([table[slots, :pages] if paged else table[slots] for table, paged in groups])

    def adapters(self, slots: NDArray[np.int32]) -> NDArray[np.int32] | None:
        """For a batch: the adapters of these rows; None: no row has one."""
        if not self.num_adapted:
            return None
        found = self.adapter[slots]
        return found if found.any() else None

    def cover(self, slot: int, lease: Lease) -> None:
        """The lease has grown, or shrunk."""
        self.covered[slot] = lease.held * self.page_size

    def enter(self, request: Request, lease: Lease, known: NDArray[np.int32]) -> int:
        slot = self._free[lease.part].pop()
        request.slot, request.lease, request.known = slot, lease, known
        request.status = RequestStatus.RUNNING
        self.requests[slot] = request
        self.computed[slot] = lease.shared * self.page_size
        self.length[slot] = len(known)
        self.limit[slot] = request.limit
        self.cover(slot, lease)
        self.next_token[slot] = known[-1]
        self.samples[slot] = not request.scores_only
        self.forced[slot] = _ALL
        self.itl[slot] = request.itl or np.inf
        if request.adapter is not None:
            self.adapter[slot] = request.adapter.entry
            self.num_adapted += 1
        self._active[slot] = request
        self._active_array = None
        return slot

    def retire(self, slot: int) -> None:
        """Not launched again; slot and pages stay until `leave`."""
        self._held.pop(slot, None)
        if self._active.pop(slot, None) is not None:
            self._active_array = None

    def hold(self, slot: int, why: int) -> None:
        """Sit out until `resume`: `STEP`, what the step in flight gives is known; `LATE`, what is waited for is there.

        A slot that is held for several reasons waits for all of them.
        """
        if slot in self._active:
            self._held[slot] = self._held.get(slot, 0) | why
            self._active_array = None

    def resume(self, slot: int, why: int) -> None:
        bits = self._held.get(slot, 0)
        if bits & why:
            self._held[slot] = bits & ~why
            if bits == why:
                del self._held[slot]
            self._active_array = None

    def extend(self, request: Request, count: int) -> None:
        """`count` tokens were added to the request's output that no step has sampled: computed has more to chase."""
        slot = request.slot
        request.known = request.all_known()
        self.forced[slot] = self.length[slot]
        self.length[slot] += count
        self.next_token[slot] = request.known[-1]
        self._active_array = None

    def restore(self, request: Request, computed: int) -> None:
        """Nothing of the request is in flight any more, and of its tokens `computed` have KV, or less: see its lease.

        Its known tokens are the prompt and the output so far; it may be launched again.
        """
        slot = request.slot
        lease = self.lease(slot)
        request.known = request.all_known()
        self.cover(slot, lease)
        self.computed[slot] = max(lease.shared * self.page_size, min(computed, int(self.covered[slot])))
        self.length[slot] = len(request.known)
        self.forced[slot] = _ALL
        self.next_token[slot] = request.known[-1]
        self._active.setdefault(slot, request)
        self._active_array = None
        self.resume(slot, STEP)
        if request.waits:
            self.hold(slot, LATE)

    def leave(self, request: Request) -> None:
        slot = request.slot
        self.retire(slot)
        self.readmit.pop(slot, None)
        self.requests[slot] = None
        if request.adapter is not None:
            self.adapter[slot] = 0
            self.num_adapted -= 1
        self._free[slot % self.parts].append(slot)
        request.slot, request.lease = -1, None
