"""From queues, a token budget and the cache's face to a `Batch`: pure decisions, no device, no messages.

One budget serves decodes and prefill chunks in one batch, decodes first. Pages that run out are taken from the request
with the largest key (the policy's last: lowest priority, youngest); it returns to the queue with all it has generated
and is computed again. A request whose next page another one computes in this very step waits a step and then finds it
in the cache: shared prefixes that arrive together are computed once.

A step takes one prompt after the other, not all at once, because many prompts that share steps all end late; only as
many as a step needs to be worth its while (`Pace.worthwhile`) share one. A prompt that needs several steps leaves a
part of each to requests that end in that very step, such as those that find nearly all of their prompt cached.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from phloem.core.batch import FROM_DEVICE, Admission, Batch
from phloem.core.request import RequestStatus
from phloem.scheduler.recovery import Throttle

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phloem.kvcache.manager import CacheManager, Given
    from phloem.kvcache.radix import Found
    from phloem.scheduler.policies import Policy, WaitingQueue
    from phloem.scheduler.state import Request, Slots

log = logging.getLogger(__name__)

SCAN = 64  # candidates looked at beyond the free slots; those that wait for a shared prefix are passed over
KEPT = 4  # a prompt that goes on leaves 1 / KEPT of a step to those that wait
HORIZON = 1024  # output tokens of a running request that admission looks ahead to, at most
_NOTHING = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class Headroom:
    """Which share of the tokens still to come must fit before one more request is admitted. Preemptions raise it."""

    share: float = 0.3
    low: float = 0.1

    def preempted(self) -> None:
        self.share = min(1.0, self.share + 0.15)

    def relax(self) -> None:
        self.share = max(self.low, self.share - 0.002)


@dataclass(frozen=True, slots=True)
class Pace:
    """How many prompt tokens a step takes."""

    budget: int  # tokens of a step, decodes included
    mixed: int  # prompt tokens of a step that also decodes: running requests wait for it
    worthwhile: int  # prompt tokens from which on another prompt makes a step no more efficient


@dataclass(slots=True)
class Plan:
    """A batch and what the scheduler must know of it."""

    batch: Batch
    rows: list[Request]
    prefills: list[Request]  # the rows after the decodes
    scored: set[int] = field(default_factory=set)  # rows that end a request without sampling
    mark: int = 0  # of the cache, at launch
    given: list[Given] = field(default_factory=list)  # pages that the launch gave to the tree


@dataclass(slots=True)
class _Steady:
    """The rows of a step that only decoded. While nobody comes or goes the next ones have the same, one token on."""

    active: NDArray[np.int32]  # the slots; another array (`Slots.active`) means other rows
    rows: list[Request]
    query_lens: NDArray[np.int32]
    sample: NDArray[np.bool_]
    page_table: NDArray[np.int32]
    covered: NDArray[np.int32]  # positions that each row has pages for
    longest: int  # tokens of the longest row, with the one that is computed next
    left: int  # steps until a row comes to its end


@dataclass(slots=True)
class Refusal:
    """A request that planning found impossible, or that failed while it was planned."""

    request: Request
    message: str
    status_code: int


class Planner:
    """Plans over the slots, the waiting queue and the cache that it is given; the scheduler owns them."""

    def __init__(
        self,
        slots: Slots,
        queue: WaitingQueue,
        cache: CacheManager,
        policy: Policy,
        pace: Pace,
        eos_ids: tuple[int, ...] = (),
    ) -> None:
        self.slots = slots
        self.queue = queue
        self.cache = cache
        self.policy = policy
        self.pace = pace
        self.throttle = Throttle.of(max(pace.budget, slots.count))
        self.epoch = 0
        self.eos_ids = eos_ids
        self.headroom = Headroom()
        self.refused: list[Refusal] = []
        self.preemptions = 0
        self.prompt_tokens = 0  # of all first admissions
        self.cached_tokens = 0
        self._step = 0
        self._steady: _Steady | None = None

    def next_batch(self) -> Plan | None:
        """The next step's work, or None. Takes pages and slots, but `computed` advances only in `advance`."""
        slots, preemptions, pace = self.slots, self.preemptions, self.pace
        most = self.throttle.budget
        active = slots.active()
        if self._steady is not None:
            plan = self._one_more(self._steady) if self._goes_on(self._steady, active) else None
            if plan is not None:
                return plan
            self._steady = None
        decodes, chunks = _NOTHING, []
        budget = min(pace.budget, most)
        if len(active):
            todo = slots.length[active] - slots.computed[active]
            decodes = active[todo == 1]
            if len(decodes) > most:  # while memory is short: the others sit out with their pages
                decodes = self._first(decodes, most)
            decodes = self._cover_decodes(decodes)
            if len(decodes):
                # With every slot decoding there must be a token for each, or the last ones would starve.
                budget = min(max(budget - len(decodes), 0), pace.mixed)
            if (todo > 1).any():
                kept = budget // KEPT if len(self.queue) and slots.num_free else 0
                chunks = self._continue_prefills(active[todo > 1], budget - kept)
                decodes = decodes[[slots.requests[slot] is not None for slot in decodes.tolist()]]
        budget -= sum(count for _, count in chunks)
        admissions: list[Admission] = []
        # Whoever was preempted just now must not take the pages back in the same breath.
        if len(self.queue) and slots.num_free and budget > 0 and preemptions == self.preemptions:
            budget -= self._admit(budget, chunks, admissions)
        if chunks and budget > 0:
            self._lengthen(chunks, budget)
        self.headroom.relax()
        if not len(decodes) and not chunks:
            return None
        self._step += 1
        return self._assemble(decodes, chunks, admissions)

    def advance(self, plan: Plan) -> None:
        """The plan's batch is launched: requests advance, and whole pages of known tokens enter the tree."""
        slots, batch = self.slots, plan.batch
        at = batch.slots
        plan.mark = self.cache.mark()
        if self._steady is not None:  # planned by `_one_more`: nothing ends, nothing enters the tree
            slots.computed[at] += 1
            slots.length[at] += 1
            slots.next_token[at] = FROM_DEVICE
            for request in plan.rows:
                request.inflight += 1
            return
        slots.computed[at] += batch.query_lens
        slots.length[at] += batch.sample
        slots.next_token[at[batch.sample]] = FROM_DEVICE
        if batch.sample.all():
            for request in plan.rows:
                request.inflight += 1
        else:
            for request, sampled in zip(plan.rows, batch.sample.tolist(), strict=True):
                request.inflight += sampled
        ends = (slots.length[at] >= slots.limit[at]) & (batch.sample | (slots.computed[at] >= slots.length[at]))
        if not plan.prefills and not ends.any() and batch.sample.all():
            self._steady = self._steadily(plan)
            return
        for row in np.flatnonzero(ends).tolist():
            slots.retire(plan.rows[row].slot)
            if not batch.sample[row]:
                plan.scored.add(row)
        for request in plan.prefills:
            computed = int(slots.computed[request.slot])
            request.targets_from = max(request.targets_from, computed + 1)
            lease = request.lease
            assert lease is not None
            plan.given.append(self.cache.given(lease))
            try:
                self.cache.commit(lease, request.known, computed)
            except Exception as error:
                self._failed(request, error)

    def undone(self) -> None:
        """Launched steps were undone and the runner has forgotten its slots: who runs is admitted once more."""
        self.epoch += 1
        for request in self.slots.running():
            try:
                self.slots.readmit[request.slot] = self._admission(request, request.known)
            except Exception as error:
                self._failed(request, error)

    def preempt(self, request: Request) -> None:
        """Back to the queue; its pages are free at once, what they held stays in the tree while there is room."""
        self.release(request)
        request.status = RequestStatus.WAITING
        request.match_version = -1
        self.queue.add(request)
        self.preemptions += 1

    def release(self, request: Request, keep: bool = True) -> None:
        """Take slot and pages from a request; with `keep`, whole computed pages of known tokens stay in the tree."""
        lease = request.lease
        assert lease is not None
        computed = int(self.slots.computed[request.slot])
        self.slots.leave(request)
        self.cache.release(lease, request.all_known() if keep else _NOTHING, computed, keep)

    # decodes alone

    def _steadily(self, plan: Plan) -> _Steady | None:
        """What goes on from a step that only decoded and has been launched; None where the next one is not alike."""
        slots, batch = self.slots, plan.batch
        active, at = slots.active(), batch.slots
        if len(at) != len(active):
            return None
        longest, left = int(slots.computed[at].max()) + 1, int((slots.limit[at] - slots.length[at]).min()) - 1
        return _Steady(
            active,
            plan.rows,
            batch.query_lens,
            batch.sample,
            batch.page_table,
            slots.covered[at],
            longest,
            left,
        )

    def _goes_on(self, steady: _Steady, active: NDArray[np.int32]) -> bool:
        slots = self.slots
        if steady.active is not active or steady.left <= 0 or len(active) > self.throttle.budget:
            return False
        return not (len(self.queue) and slots.num_free) and not slots.readmit

    def _one_more(self, steady: _Steady) -> Plan | None:
        """The next step of these rows; None, and nothing is changed, where pages for it must be taken from others."""
        slots, at = self.slots, steady.active
        computed = slots.computed[at]
        needy = np.flatnonzero(computed >= steady.covered)
        if len(needy):
            leases = [lease for row in needy.tolist() if (lease := steady.rows[row].lease) is not None]
            if not self.cache.reserve_one_each(leases):
                return None
            slots.covered[at[needy]] += slots.page_size
            steady.covered = slots.covered[at]
        self.headroom.relax()
        pages = -(-steady.longest // slots.page_size)
        if len(needy) or pages != steady.page_table.shape[1]:
            steady.page_table = slots.tables[at, :pages]
        steady.longest += 1
        steady.left -= 1
        self._step += 1
        batch = Batch(
            step=self._step,
            slots=at,
            query_lens=steady.query_lens,
            prefix_lens=computed,
            input_ids=slots.next_token[at],
            page_table=steady.page_table,
            sample=steady.sample,
            epoch=self.epoch,
        )
        return Plan(batch, steady.rows, [])

    # decodes and running prefills

    def _cover_decodes(self, decodes: NDArray[np.int32]) -> NDArray[np.int32]:
        """See that every decoding row has a page for its new token; gives the rows that have."""
        slots = self.slots
        needy = decodes[slots.computed[decodes] + 1 > slots.covered[decodes]]
        while len(needy):
            leases = [lease for slot in needy.tolist() if (lease := slots.at(slot).lease) is not None]
            if self.cache.reserve_one_each(leases):
                slots.covered[needy] += self.cache.page_size
                break
            if slots.num_ending:
                # Pages come free when the step in flight is committed: better to sit out a step than to recompute.
                last = max((slots.at(slot) for slot in needy.tolist()), key=_place)
                decodes, needy = decodes[decodes != last.slot], needy[needy != last.slot]
                continue
            victim = max(slots.active_requests(), key=_place)
            decodes, needy = decodes[decodes != victim.slot], needy[needy != victim.slot]
            self._evict_request(victim)
        return decodes

    def _first(self, slots: NDArray[np.int32], count: int) -> NDArray[np.int32]:
        """The `count` slots whose requests come first."""
        order = sorted(slots.tolist(), key=lambda slot: _place(self.slots.at(slot)))
        return np.array(sorted(order[:count]), dtype=np.int32)

    def _continue_prefills(self, prefills: NDArray[np.int32], budget: int) -> list[tuple[Request, int]]:
        chunks: list[tuple[Request, int]] = []
        still = [request for slot in prefills.tolist() if (request := self.slots.requests[slot]) is not None]
        for request in sorted(still, key=_place):
            if budget <= 0:
                break
            if request.slot < 0:
                continue  # preempted for a request before it
            todo = int(self.slots.length[request.slot] - self.slots.computed[request.slot])
            try:
                count = self._cover_chunk(request, min(todo, budget))
            except Exception as error:
                self._failed(request, error)
                continue
            if count:
                chunks.append((request, count))
                budget -= count
        return chunks

    def _lengthen(self, chunks: list[tuple[Request, int]], budget: int) -> None:
        """What was kept for others and not wanted goes to the first prompt."""
        request, count = chunks[0]
        more = min(int(self.slots.length[request.slot] - self.slots.computed[request.slot]) - count, budget)
        lease = request.lease
        assert lease is not None
        page_size = self.cache.page_size
        room = (lease.held + self.cache.available_pages) * page_size - int(self.slots.computed[request.slot])
        if more > 0 and count + more <= room:
            chunks[0] = (request, self._cover_chunk(request, count + more))

    def _cover_chunk(self, request: Request, count: int) -> int:
        """Pages for the request's next `count` tokens, or for fewer; gives how many."""
        slots, cache, lease = self.slots, self.cache, request.lease
        assert lease is not None
        computed = int(slots.computed[request.slot])
        while True:
            room = (lease.held + cache.available_pages) * cache.page_size - computed
            if room > 0:
                count = min(count, room)
                cache.reserve(lease, computed + count)
                slots.covered[request.slot] = lease.held * cache.page_size
                return count
            victim = max(slots.active_requests(), key=_place)
            if slots.num_ending or victim is request:
                return 0
            self._evict_request(victim)

    def _evict_request(self, victim: Request) -> None:
        log.debug("request %s is preempted: out of pages", victim.id)
        self.preempt(victim)
        self.headroom.preempted()

    # admission

    def _admit(self, budget: int, chunks: list[tuple[Request, int]], admissions: list[Admission]) -> int:
        """Put waiting requests into slots, and their first chunks behind `chunks`; gives how many tokens these have."""
        slots, cache, queue, left = self.slots, self.cache, self.queue, budget
        begun = bool(chunks)  # a prompt that goes on; beside it only those enter that end in this step
        computing = {_next_page(request, cache.page_size) for request, _ in chunks} if cache.enabled else set()
        promised = self._promised_pages()
        for request in self.policy.order(queue, slots.num_free + SCAN, cache):
            if left <= 0 or not slots.num_free or (not begun and budget - left >= self.pace.worthwhile):
                break
            if request.inflight:
                continue  # its last token is not known yet
            try:
                known = request.all_known()
                found = cache.probe(request.submit.namespace, known, request.match_limit())
                if begun and len(known) - found.num_pages * cache.page_size > left:
                    continue
                if computing and self._comes_soon(request, known, found, computing):
                    continue
                count = self._enter(request, known, found, left, promised)
                if count == 0:
                    break  # none may overtake it, or a long prompt would never run
                admission = self._admission(request, known)
            except Exception as error:
                if request.slot >= 0:
                    self.release(request, keep=False)
                    request.status = RequestStatus.WAITING
                self._failed(request, error)
                continue
            queue.take(request)
            admissions.append(admission)
            chunks.append((request, count))
            left -= count
            promised += self._still_needs(request)
            if cache.enabled:
                computing.add(_next_page(request, cache.page_size))
        return budget - left

    def _comes_soon(
        self, request: Request, known: NDArray[np.int32], found: Found, computing: set[tuple[int, bytes]]
    ) -> bool:
        """Whether the first page that this request lacks is being computed in the step that is planned."""
        size = self.cache.page_size
        if found.node is None or (found.num_pages + 1) * size > request.match_limit():
            return False
        page = known[found.num_pages * size : (found.num_pages + 1) * size].tobytes()
        return (found.node.uid, page) in computing

    def _enter(self, request: Request, known: NDArray[np.int32], found: Found, budget: int, promised: int) -> int:
        """Put a waiting request into a slot with pages for its first chunk: the chunk's length, or 0 for no room."""
        slots, cache = self.slots, self.cache
        alone = slots.num_running == 0
        if not alone and self._pages_for(len(known)) - found.num_pages > cache.available_pages - promised:
            return 0  # not even with all that is evictable; the usual case while the pool is full
        table = (slots.tables[slots.next_free()],)
        lease = cache.match(request.submit.namespace, known, request.match_limit(), table)
        needed = -(-len(known) // cache.page_size) - lease.held
        if needed > cache.available_pages - (0 if alone else promised):
            cache.release(lease, _NOTHING, 0)
            if alone and needed > cache.available_pages:
                most = cache.total_pages * cache.page_size
                message = f"{len(known)} tokens do not fit the KV cache of {most} tokens"
                self.refused.append(Refusal(request, message, 400))
            return 0
        cached = lease.shared * cache.page_size
        count = min(len(known) - cached, budget)
        cache.reserve(lease, cached + count)
        slots.enter(request, lease, known)
        if request.admitted < 0:
            request.cached_tokens = cached
            self.prompt_tokens += request.num_prompt
            self.cached_tokens += cached
        return count

    def _promised_pages(self) -> int:
        """Pages that running requests will want: the rest of their prompts, and a share of the output to come."""
        slots = self.slots
        active = slots.active()
        if not len(active):
            return 0
        length = slots.length[active]
        prompts = np.maximum(0, -(-(length - slots.covered[active]) // slots.page_size)).sum()
        growth = np.minimum(slots.limit[active] - length, HORIZON).sum() * self.headroom.share
        return int(prompts) + self._pages_for(int(growth))

    def _still_needs(self, request: Request) -> int:
        slot = request.slot
        growth = min(int(self.slots.limit[slot] - self.slots.length[slot]), HORIZON) * self.headroom.share
        missing = int(self.slots.length[slot] - self.slots.covered[slot])
        return self._pages_for(max(0, missing)) + self._pages_for(int(growth))

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.slots.page_size)

    def _admission(self, request: Request, known: NDArray[np.int32]) -> Admission:
        submit, params = request.submit, request.params
        ends = (() if params.ignore_eos else self.eos_ids) + tuple(params.stop_token_ids)
        mask = None
        if request.prepared is not None:
            request.prepared.admit(request.output)
            mask = request.prepared.mask
        return Admission(
            slot=request.slot,
            request_id=request.id,
            params=params,
            seed=request.seed,
            tokens=known,
            num_prompt=request.num_prompt,
            eos_ids=ends if mask is None else (),  # a mask keeps `min_new_tokens` itself, where the grammar allows
            return_logprob=submit.return_logprob,
            top_logprobs=submit.top_logprobs,
            token_ids_logprob=tuple(submit.token_ids_logprob),
            return_hidden=submit.return_hidden,
            mask=mask,
        )

    def _failed(self, request: Request, error: Exception) -> None:
        """One request's planning raised: it ends, alone."""
        log.error("request %s failed while it was planned", request.id, exc_info=error)
        self.refused.append(Refusal(request, f"{type(error).__name__}: {error}", 500))

    # the batch

    def _assemble(
        self, decodes: NDArray[np.int32], chunks: list[tuple[Request, int]], admissions: list[Admission]
    ) -> Plan:
        slots = self.slots
        prefills = [request for request, _ in chunks]
        rows = [slots.at(slot) for slot in decodes.tolist()] + prefills
        at = np.concatenate([decodes, np.array([request.slot for request in prefills], dtype=np.int32)])
        query_lens = np.ones(len(rows), dtype=np.int32)
        query_lens[len(decodes) :] = [count for _, count in chunks]
        prefix_lens = slots.computed[at]
        ends = prefix_lens + query_lens
        ids = [slots.next_token[decodes]]
        targets: dict[int, NDArray[np.int32]] = {}
        for row, (request, count) in enumerate(chunks, start=len(decodes)):
            start = int(prefix_lens[row])
            ids.append(request.known[start : start + count])
            if request.wants_prompt and start + count >= request.targets_from and start + 1 < request.num_prompt:
                targets[row] = _targets(request, start, count)
        pages = -(-int(ends.max()) // slots.page_size)
        if slots.readmit:
            again = [slots.readmit.pop(slot) for slot in at.tolist() if slot in slots.readmit]
            admissions = again + admissions
        batch = Batch(
            step=self._step,
            slots=at,
            query_lens=query_lens,
            prefix_lens=prefix_lens,
            input_ids=np.concatenate(ids),
            page_table=slots.tables[at, :pages],
            sample=(ends == slots.length[at]) & slots.samples[at],
            admissions=admissions,
            epoch=self.epoch,
            prompt_targets=targets,
        )
        return Plan(batch, rows, prefills)


def _place(request: Request) -> tuple[float, int]:
    return request.key, request.seq


def _next_page(request: Request, page_size: int) -> tuple[int, bytes]:
    """What this row computes next, as the tree will know it: below which node, which tokens."""
    lease = request.lease
    assert lease is not None
    start = lease.shared * page_size
    return lease.node.uid, request.known[start : start + page_size].tobytes()


def _targets(request: Request, start: int, count: int) -> NDArray[np.int32]:
    """For new positions start..start+count: the prompt token after each, or -1 where its logprob is not wanted."""
    targets = np.full(count, -1, dtype=np.int32)
    first = max(start + 1, request.targets_from)
    last = min(start + count + 1, request.num_prompt)
    if first < last:
        targets[first - start - 1 : last - start - 1] = request.prompt[first:last]
    return targets
