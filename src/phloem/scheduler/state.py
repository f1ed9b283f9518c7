"""What the scheduler keeps of each request, and the slots of the running ones as arrays.

Words used throughout: a request has `length` tokens, the last of which may still be *in flight* (sampled by a launched
step, value unknown to the host); of these, `computed` have their KV written by launched steps. Computed chases length:
whoever has `length - computed` > 0 wants that many new tokens in the next step. A fresh prompt, a prefix hit, the next
chunk, the return after a preemption and a decode (difference 1) are all this one case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from phloem.core.batch import FROM_DEVICE, PositionLogprobs
from phloem.core.messages import Logprobs, Submit, unpack_ids
from phloem.core.request import RequestStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.core.batch import Admission
    from phloem.core.errors import PhloemError
    from phloem.kvcache.manager import Lease


class Prepared(Protocol):
    """Something that a request waits for before it may run: a grammar that compiles, pages that are fetched."""

    @property
    def error(self) -> PhloemError | None:
        """Why the request cannot be served; looked at once `ready` is True."""
        ...

    @property
    def mask(self) -> Callable[[list[int]], NDArray[np.int32] | None] | None:
        """For `Admission.mask`; looked at once `ready` is True."""
        ...

    @property
    def can_jump(self) -> bool:
        """Whether `jump` may ever give tokens."""
        ...

    def ready(self) -> bool: ...

    def admit(self, output: Sequence[int]) -> None:
        """The request enters a slot, for the first time or again after a preemption, with this output so far."""
        ...

    def jump(self, output: Sequence[int]) -> list[int]:
        """Tokens that are sure to follow the output."""
        ...

    def advance(self, output: Sequence[int]) -> None:
        """The output is now this, with forced tokens in it; no launched step of the request is uncommitted."""
        ...


class Request:
    """One request, from `Submit` to its last chunk."""

    __slots__ = (
        "admitted",
        "cached_tokens",
        "fresh",
        "fresh_hidden",
        "fresh_logprobs",
        "id",
        "inflight",
        "key",
        "known",
        "lease",
        "limit",
        "match_pages",
        "match_version",
        "message",
        "num_prompt",
        "output",
        "params",
        "passed_mark",
        "plain",
        "prepared",
        "prompt",
        "prompt_logprobs",
        "received",
        "seed",
        "sent",
        "seq",
        "slot",
        "status",
        "stops",
        "submit",
        "targets_from",
        "wants_prompt",
    )

    def __init__(self, submit: Submit, now: float) -> None:
        self.id = submit.id
        self.submit = submit
        self.params = submit.sampling
        self.prompt = unpack_ids(submit.input_ids)
        self.num_prompt = len(self.prompt)
        self.output: list[int] = []
        self.known = self.prompt  # what was known when it last entered a slot
        self.status = RequestStatus.WAITING
        self.key, self.seq = 0.0, 0  # place in the queue; smaller runs earlier and is preempted later
        self.limit = 0  # length at which it surely ends
        self.stops: frozenset[int] = frozenset()
        self.seed = 0
        self.slot = -1
        self.lease: Lease | None = None
        self.inflight = 0  # sampled tokens whose value is not known yet
        self.prepared: Prepared | None = None
        self.received, self.admitted = now, -1.0
        self.cached_tokens = 0
        self.match_pages, self.match_version = 0, -1
        self.passed_mark = -1  # admissions seen when it came into the policy's window
        start = submit.logprob_start
        self.wants_prompt = submit.return_logprob and start >= 0
        self.targets_from = max(start, 1)  # first prompt position whose logprob is not launched yet
        self.prompt_logprobs: list[PositionLogprobs] = []
        self.fresh: list[int] = []  # tokens not sent yet
        self.fresh_logprobs: list[PositionLogprobs] = []
        self.fresh_hidden: list[bytes] = []
        self.sent = False
        self.message = -1  # the message that its last chunk is in
        # Nothing but its token is to be told of a step, and nothing to be done with it.
        self.plain = not (submit.return_logprob or submit.return_hidden)

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
        limit = self.num_prompt + len(self.output) - 1
        if self.wants_prompt and self.targets_from < self.num_prompt:
            limit = min(limit, self.targets_from - 1)
        return limit

    def forget_inflight(self) -> None:
        """The steps in flight are dropped: what they have of this request must be launched again."""
        self.inflight = 0
        self.targets_from = self.first_target + len(self.prompt_logprobs)


def pack_logprobs(items: list[PositionLogprobs], submit: Submit) -> Logprobs:
    return Logprobs(
        values=[item.token for item in items],
        top=[item.top for item in items] if submit.top_logprobs else [],
        chosen=[item.chosen for item in items] if submit.token_ids_logprob else [],
    )


class Slots:
    """The running requests by slot. Page tables are rows of one array, so that a batch gathers them in one call.

    A slot is *active* while its request may be launched. One that will surely end with a launched step has left
    `active` but keeps slot and pages until that step is committed.
    """

    def __init__(self, count: int, table_width: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self.requests: list[Request | None] = [None] * count
        self.tables = np.zeros((count, table_width), dtype=np.int32)
        self.computed = np.zeros(count, dtype=np.int32)
        self.length = np.zeros(count, dtype=np.int32)
        self.limit = np.zeros(count, dtype=np.int32)
        self.covered = np.zeros(count, dtype=np.int32)  # positions that the lease has pages for
        self.next_token = np.full(count, FROM_DEVICE, dtype=np.int32)
        self.samples = np.zeros(count, dtype=np.bool_)
        self.readmit: dict[int, Admission] = {}  # active slots that the runner must be told of again
        self._free = list(range(count - 1, -1, -1))
        self._active: dict[int, Request] = {}
        self._held: set[int] = set()  # active, but not to be launched before their last token is known
        self._active_array: NDArray[np.int32] | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_running(self) -> int:
        return self.count - len(self._free)

    @property
    def num_ending(self) -> int:
        """Slots that are only kept until their last step is committed."""
        return self.num_running - len(self._active)

    def next_free(self) -> int:
        return self._free[-1]

    def active(self) -> NDArray[np.int32]:
        """Slots that may be launched now, in order of admission, int32."""
        if self._active_array is None:
            slots = [slot for slot in self._active if slot not in self._held] if self._held else list(self._active)
            self._active_array = np.array(slots, dtype=np.int32)
        return self._active_array

    def active_requests(self) -> list[Request]:
        return list(self._active.values())

    def running(self) -> list[Request]:
        return [request for request in self.requests if request is not None]

    def at(self, slot: int) -> Request:
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is empty"
        return request

    def enter(self, request: Request, lease: Lease, known: NDArray[np.int32]) -> int:
        slot = self._free.pop()
        request.slot, request.lease, request.known = slot, lease, known
        request.status = RequestStatus.RUNNING
        self.requests[slot] = request
        self.computed[slot] = lease.shared * self.page_size
        self.length[slot] = len(known)
        self.limit[slot] = request.limit
        self.covered[slot] = lease.held * self.page_size
        self.next_token[slot] = known[-1]
        self.samples[slot] = not request.scores_only
        self._active[slot] = request
        self._active_array = None
        return slot

    def retire(self, slot: int) -> None:
        """Not launched again; slot and pages stay until `leave`."""
        self._held.discard(slot)
        if self._active.pop(slot, None) is not None:
            self._active_array = None

    def hold(self, slot: int) -> None:
        """Sit out until `extend` or `resume`: what the step in flight gives decides what comes next."""
        if slot in self._active:
            self._held.add(slot)
            self._active_array = None

    def resume(self, slot: int) -> None:
        if slot in self._held:
            self._held.discard(slot)
            self._active_array = None

    def extend(self, request: Request, count: int) -> None:
        """`count` tokens were added to the request's output that no step has sampled: computed has more to chase."""
        slot = request.slot
        request.known = request.all_known()
        self.length[slot] += count
        self.next_token[slot] = request.known[-1]
        self._held.discard(slot)
        self._active_array = None

    def restore(self, request: Request, computed: int) -> None:
        """Nothing of the request is in flight any more, and of its tokens `computed` have KV, or less: see its lease.

        Its known tokens are the prompt and the output so far; it may be launched again.
        """
        slot, lease = request.slot, request.lease
        assert lease is not None
        request.known = request.all_known()
        self.computed[slot] = max(lease.shared * self.page_size, min(computed, lease.held * self.page_size))
        self.length[slot] = len(request.known)
        self.covered[slot] = lease.held * self.page_size
        self.next_token[slot] = request.known[-1]
        self._held.discard(slot)
        self._active.setdefault(slot, request)
        self._active_array = None

    def leave(self, request: Request) -> None:
        slot = request.slot
        self.retire(slot)
        self.readmit.pop(slot, None)
        self.requests[slot] = None
        self._free.append(slot)
        request.slot, request.lease = -1, None
