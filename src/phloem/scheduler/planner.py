"""From queues, a token budget and the cache's face to a `Batch`: no device, no messages.

One budget serves decodes and prefill chunks in one batch, decodes first. Pages that run out are taken from the request
with the largest key (the policy's last: lowest priority, youngest); it returns to the queue with all it has generated
and is computed again. A request whose next page another one computes in this very step waits a step and then finds it
in the cache: shared prefixes that arrive together are computed once.

A step takes one prompt after the other, not all at once, because many prompts that share steps all end late; only as
many as a step needs to be worth its while (`Pace.worthwhile`) share one. A prompt that needs several steps leaves a
part of each to requests that end in that very step, such as those that find nearly all of their prompt cached.

`plan.spend` decides all this and changes nothing; here its decision is carried out: pages are taken, or, where there
are none, somebody gives up theirs and it is decided anew.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from phloem.core.batch import FROM_DEVICE, sure
from phloem.core.request import RequestStatus
from phloem.scheduler.attention_groups import Groups, promised_in_each
from phloem.scheduler.batches import Steady, assemble, entry
from phloem.scheduler.blocks import cover, from_cached, reach, spend_blocks
from phloem.scheduler.chunks import Chunks
from phloem.scheduler.plan import HORIZON, Chunk, Headroom, Means, Refusal, spend
from phloem.scheduler.policies import level_of
from phloem.scheduler.recovery import Throttle
from phloem.scheduler.state import STEP

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from numpy.typing import NDArray

    from phloem.core.batch import StepOutput
    from phloem.kvcache.manager import CacheManager, Lease
    from phloem.kvcache.tiers._fetch import Claim
    from phloem.scheduler.further import Further
    from phloem.scheduler.lending import Lending
    from phloem.scheduler.mixture import Mixture
    from phloem.scheduler.plan import Pace, Plan, Spent
    from phloem.scheduler.policies import Policy, WaitingQueue
    from phloem.scheduler.state import Entry, Request, Slots
    from phloem.scheduler.tempo import Tempo

log = logging.getLogger(__name__)

SCAN = 64  # candidates looked at beyond the free slots; those that wait for a shared prefix are passed over
_NOTHING = np.empty(0, dtype=np.int32)


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
        mixture: Mixture | None = None,
    ) -> None:
        self.slots = slots
        self.queue = queue
        self.cache = cache
        self.policy = policy
        self.pace = pace
        self.throttle = Throttle.of(max(pace.budget, slots.count))
        self.epoch = 0
        self.eos_ids = eos_ids
        self.mixture = mixture
        self.further: Further | None = None
        self.lending: Lending | None = None
        self.tempo: Tempo | None = None  # where steps are to be short enough for what requests are promised
        self.chunks = None if pace.price is None else Chunks()  # where chunks of a prompt are to take equal time
        self.headroom = Headroom()
        self.refused: list[Refusal] = []
        self.preemptions = 0
        self.prompt_tokens = 0  # of all first admissions
        self.cached_tokens = 0
        self._step = 0
        self._steady: Steady | None = None  # says what comes next if nothing changes: an answer, no state

    def next_batch(self) -> Plan | None:
        """The next step's work, or None. Takes pages and slots, but `computed` advances only in `advance`."""
        plan = self._one_more()
        if plan is not None:
            return self._counted(plan)
        if ((self.pace.draft_room and self.pace.waves == 1) or self.slots.block) and self._out_of_step():
            return None
        if not len(self.queue) and not len(self.slots.active()):
            self.headroom.relax()
            return None  # all wait for their step, or there is nobody
        if self.policy.yields and len(self.queue):
            self._give_way()
        choose = spend_blocks if self.slots.block else spend
        resting: set[int] = set()
        preemptions = self.preemptions
        while True:
            # Whoever was preempted just now must not take the pages back in the same breath.
            entries = self.slots.num_free if preemptions == self.preemptions else 0
            spent = choose(self.slots, self._waiting(), self._means(entries, resting))
            lacking = spent.lacking or self._take(spent)
            if not lacking:
                break
            self._make_room(lacking, resting)
        entered = self._enter_all(spent)
        if not len(spent.decodes) and not spent.chunks and not entered:
            self.headroom.relax()
            return None
        return self._counted(assemble(self.slots, spent, entered, self._step + 1, self.epoch))

    def _counted(self, plan: Plan) -> Plan:
        self.headroom.relax()
        self._step = plan.batch.step
        return plan

    def _one_more(self) -> Plan | None:
        """The next step of the rows that have just been launched, if these are all that may run."""
        slots, steady, active = self.slots, self._steady, self.slots.active()
        if steady is None or steady.active is not active or steady.left <= 0 or len(active) > self.throttle.budget:
            return None
        if slots.readmit or (len(self.queue) and (slots.num_free or self.policy.yields)):
            return None
        return steady.next(slots, self.cache, self._step + 1, self.epoch)

    def give_room(self, drafts: int) -> None:
        """From the next step on each row may have so many drafts. With none, a step is planned while one runs."""
        if drafts == self.pace.draft_room:
            return
        self.pace = replace(self.pace, draft_room=drafts)
        if drafts:
            self._steady = None
            for request in self.slots.active_requests():
                if request.inflight:
                    self.slots.hold(request.slot, STEP)  # what it is to be drafted behind is not known yet

    def advance(self, plan: Plan) -> None:
        """The plan's batch is launched: requests advance, and whole pages of known tokens enter the tree.

        A row advances by what is sure: its new tokens, and one that they yield. Accepted drafts come with `committed`.
        """
        slots, steady = self.slots, self._steady
        plan.mark = self.cache.mark()
        if self.cache.has_states:
            self._turn(plan)
        if plan.steady and steady is not None:
            steady.launched(slots)
            for request in plan.rows:
                request.inflight += 1
        else:
            self._advance(plan)

    def committed(self, plan: Plan, output: StepOutput) -> None:
        """What the step gave is known, and about to be told: accepted drafts count, and windows give back pages."""
        slots, batch = self.slots, plan.batch
        if self.chunks is not None:
            self.chunks.saw(batch, output.stage_seconds or output.forward_seconds)
        if slots.any_held:
            # A row whose later step is in flight waits for that one: this one may be a chunk of its prompt.
            outputs = batch.outputs if batch.canvas is None else np.minimum(batch.canvas, 1)
            for request, yields in zip(plan.rows, outputs.tolist(), strict=True):
                if request.inflight <= yields and request.slot >= 0:
                    slots.resume(request.slot, STEP)
        if batch.drafts is not None:
            for row in np.flatnonzero(output.counts > 1).tolist():
                slot, more = plan.rows[row].slot, min(int(output.counts[row]) - 1, int(batch.drafts[row]))
                if slot >= 0:
                    slots.computed[slot] += more
                    slots.length[slot] += more
        if self.cache.gives_back:
            self._give_back(plan, output)

    def undone(self) -> None:
        """Launched steps were undone and the runner has forgotten its slots: who runs is admitted once more."""
        self.epoch += 1
        for request in self.slots.running():
            try:
                self.slots.readmit[request.slot] = entry(request, request.known, self.eos_ids)
            except Exception as error:
                self._failed(request, error)

    def preempt(self, request: Request) -> None:
        """Back to the queue; its pages are free at once, what they held stays in the tree while there is room."""
        self.release(request)
        if self.lending is not None:
            self.lending.renew(request)
        self.wait_again(request)
        self.preemptions += 1

    def wait_again(self, request: Request) -> None:
        """A request without a slot waits for one, or first for what it waits for anyway."""
        request.match_version = -1
        request.status = RequestStatus.WAITING_ON if request.waits else RequestStatus.WAITING
        if not request.waits:
            self.queue.add(request)

    def release(self, request: Request, keep: bool = True) -> None:
        """Take slot and pages from a request; with `keep`, whole computed pages of known tokens stay in the tree."""
        lease = self.slots.lease(request.slot)
        computed = int(self.slots.computed[request.slot])
        self.slots.leave(request)
        self.cache.release(lease, request.all_known() if keep else _NOTHING, computed, keep)

    @property
    def fresh(self) -> float:
        """The share of all prompts that was not found in the cache; 1 where there were none."""
        return 1.0 - self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 1.0

    def state(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "cache_hit_rate": 1.0 - self.fresh,
            "preemptions": self.preemptions,
            "step_tokens": self.throttle.budget,
            "schedule_policy": self.policy.name,
            **({} if self.chunks is None else {"attention_price": self.chunks.price.ratio}),
        }

    def learn_price(self) -> None:
        """From now on chunks are to take equal time. Prompts that are computed whole have none."""
        if self.chunks is None and not self.pace.whole:
            self.chunks = Chunks()

    # what a step may spend

    def _out_of_step(self) -> bool:
        """Whether some rows that decode wait for their step while others could go on: all are to share the next one."""
        slots = self.slots
        active = slots.active()
        if slots.block:
            return slots.num_held(STEP) > 0
        decodes = slots.length[active] - slots.computed[active] == 1
        return bool(decodes.any()) and slots.num_held(STEP) > 0

    def _means(self, entries: int, resting: set[int]) -> Means:
        pace = self.pace
        if self.tempo is not None:
            pace = replace(pace, mixed=self.tempo.within(self.slots, pace.mixed))
        if self.chunks is not None:
            pace = replace(pace, price=self.chunks.price)
        return Means(
            pace=pace,
            most=self.throttle.budget,
            pages=self.cache.available_pages,
            entries=entries,
            queued=bool(len(self.queue)),
            share=self.headroom.share,
            resting=resting,
        )

    def _waiting(self) -> Iterator[Chunk]:
        """Who may enter, in the policy's order; looked up in the cache when their turn comes."""
        cache, size, paged, mixture = self.cache, self.cache.page_size, self.slots.paged[0], self.mixture
        groups = Groups(self.slots, cache, self.headroom.share)
        if mixture is not None:
            mixture.begin()
        for request in self.queue.order(self.policy, self.slots.num_free + SCAN, cache):
            if request.inflight:
                continue  # its last token is not known yet
            if mixture is not None and mixture.full_for(request):
                if mixture.out_of_patience(request):
                    return
                continue
            try:
                known, limit = request.all_known(), request.match_limit()
                part = groups.of(request.namespace, known, limit)
                if part is None:
                    return
                cached = cache.parts[part].probe(request.namespace, known, limit).num_pages
                start = cached
                if self.further is not None:
                    start += self.further.at_hand(request.id, request.namespace, known, cached, limit)
            except Exception as error:
                self._failed(request, error)
                continue
            length = reach(request, len(known), self.slots) if self.slots.block else len(known)
            yield Chunk(
                request=request,
                known=known,
                start=start * size,
                pages=min(cache.pages_for(length), -(-length // size) - cached) if paged else cache.pages_for(length),
                growth=max(0, min(request.limit - length, self.slots.growing - length, HORIZON)),
                sharable=cache.enabled and (start + 1) * size <= limit,
                part=part,
            )

    # taking it

    def _take(self, spent: Spent) -> list[Request]:
        """Pages for what running requests compute. Some may be taken already where it gives who lacks theirs."""
        slots, cache, at = self.slots, self.cache, spent.decodes
        needy = spent.needy
        for part in cache.parts if len(needy) else ():
            own = needy if slots.parts == 1 else needy[slots.part_of(needy) == part.number]
            if not part.reserve_one_each([slots.lease(slot) for slot in own.tolist()]):
                return [max((slots.at(slot) for slot in own.tolist()), key=_place)]
            slots.covered[own] += slots.page_size
        for chunk in spent.chunks:
            lease = slots.lease(chunk.request.slot)
            try:
                self._cover(chunk, lease)
            except Exception as error:
                self._failed(chunk.request, error)
                chunk.count = chunk.canvas = 0
                continue
            if not chunk.count + chunk.canvas:
                return [chunk.request]
            slots.cover(chunk.request.slot, lease)
        spent.chunks = [chunk for chunk in spent.chunks if chunk.count + chunk.canvas]
        for chunk in spent.chunks:
            if chunk.room:
                self._cover_room(chunk)
        if spent.room is not None:
            self._cover_drafts(at, spent.room)
        return []

    def _cover(self, chunk: Chunk, lease: Lease) -> None:
        """Pages for the chunk, or for less of it: then it is shortened, to nothing at worst."""
        if self.slots.block:
            cover(self.cache, self.slots.block, chunk, lease)
            return
        if self.cache.has_states:
            chunk.count = self.cache.cut(lease, chunk.known, chunk.start, chunk.count)
        if chunk.request.whole:
            chunk.count = chunk.request.uncut(chunk.start, chunk.count, more=True)
        while chunk.count and not self.cache.reserve(lease, chunk.start + chunk.count):
            chunk.count //= 2
            if chunk.request.whole:
                chunk.count = chunk.request.uncut(chunk.start, chunk.count, more=False)

    def _cover_room(self, chunk: Chunk) -> None:
        slot, end = chunk.request.slot, chunk.start + chunk.count
        lease = self.slots.lease(slot)
        if end == self.slots.length[slot] and self.cache.reserve(lease, end + chunk.room):
            self.slots.cover(slot, lease)
        else:
            chunk.room = 0

    def _cover_drafts(self, at: NDArray[np.int32], room: NDArray[np.int32]) -> None:
        slots = self.slots
        ends = slots.computed[at] + 1 + room
        for row in np.flatnonzero(ends > slots.covered[at]).tolist():
            slot = int(at[row])
            lease = slots.lease(slot)
            if self.cache.reserve(lease, int(ends[row])):
                slots.cover(slot, lease)
            else:
                room[row] = max(0, int(slots.covered[slot] - slots.computed[slot]) - 1)

    def _make_room(self, lacking: list[Request], resting: set[int]) -> None:
        """These have no pages: they sit out the step, or the last of all gives up its own."""
        slots, first = self.slots, lacking[0]
        if slots.num_ending:
            # Pages come free when the step in flight is committed: better to sit out a step than to recompute.
            resting.update(request.slot for request in lacking)
            return
        part = first.slot % slots.parts
        victim = max((other for other in slots.active_requests() if other.slot % slots.parts == part), key=_place)
        if victim is not first:
            self._evict_request(victim)
        elif slots.num_in(part) == 1:
            known = int(slots.length[first.slot])
            self.refused.append(Refusal(first, f"{known} tokens do not fit the memory for them", 400))
            resting.add(first.slot)
        elif slots.length[first.slot] - slots.computed[first.slot] > 1:
            resting.add(first.slot)  # others run; its prompt goes on when one of them has ended
        else:
            self._evict_request(victim)

    def _give_way(self) -> None:
        """Who is far less important than the first that waits, and in its way, waits in its place: one in a step."""
        slots, first = self.slots, self.queue.front(1)[0]
        if first.inflight or (self.mixture is not None and self.mixture.full_for(first)):
            return  # it could not enter either way
        known = len(first.all_known())
        if slots.num_free and (not slots.paged[0] or self.cache.pages_for(known) <= self.cache.available_pages):
            return
        last = max(slots.active_requests(), key=_place, default=None)
        if last is None or slots.num_ending:
            return  # room comes with the step that runs
        if first.key < last.key and level_of(first) - level_of(last) >= self.policy.yields:
            log.debug("request %s is preempted: request %s is more important", last.id, first.id)
            self.preempt(last)

    def _evict_request(self, victim: Request) -> None:
        log.debug("request %s is preempted: out of pages", victim.id)
        self.preempt(victim)
        self.headroom.preempted()

    def _enter_all(self, spent: Spent) -> list[tuple[Chunk, Entry]]:
        """Put waiting requests into slots, with pages for their first chunks; behind one that finds none all wait."""
        entered: list[tuple[Chunk, Entry]] = []
        promised = promised_in_each(self.slots, self.headroom.share) if self.slots.parts > 1 else [spent.promised]
        for chunk in spent.entries:
            request = chunk.request
            try:
                if not self._enter(chunk, promised[chunk.part]):
                    break
                entered.append((chunk, entry(request, chunk.known, self.eos_ids)))
            except Exception as error:
                if request.slot >= 0:
                    self.release(request, keep=False)
                    request.status = RequestStatus.WAITING
                self._failed(request, error)
                continue
            self.queue.take(request)
            missing = len(chunk.known) - int(self.slots.covered[request.slot])
            promised[chunk.part] += self._pages(max(0, missing)) if self.slots.paged[0] else 0
            promised[chunk.part] += self._pages(int(chunk.growth * self.headroom.share))
        return entered

    def _enter(self, chunk: Chunk, promised: int) -> bool:
        """Into a slot, with what the cache has of its tokens; False for no room, when these pages cannot be evicted."""
        slots, cache, request, known = self.slots, self.cache.parts[chunk.part], chunk.request, chunk.known
        alone = slots.num_in(chunk.part) == 0
        lease = cache.match(request.namespace, known, request.match_limit(), slots.next_free(chunk.part))
        claim = None if slots.block else self._claim(request, known, lease)
        cached = (lease.shared + (0 if claim is None else claim.count)) * cache.page_size
        needed = chunk.pages
        if slots.block:
            needed += (chunk.start - cached) // cache.page_size if slots.paged[0] else 0
            from_cached(chunk, cached, slots)
        else:
            if slots.paged[0]:
                needed = min(cache.pages_for(len(known)), -(-len(known) // cache.page_size) - lease.shared)
            chunk.start, chunk.count = cached, min(len(known) - cached, chunk.count)
        fits = needed <= cache.available_pages - (0 if alone else promised)
        if fits:
            self._cover(chunk, lease)
        if not fits or not chunk.count + chunk.canvas:
            if claim is not None and self.further is not None:
                self.further.give_up(claim)
            cache.release(lease, _NOTHING, 0)
            if alone:
                most = cache.most_pages * cache.page_size
                message = f"{len(known)} tokens do not fit the KV cache of {most} tokens"
                self.refused.append(Refusal(request, message, 400))
            return False
        slots.enter(request, lease, known)
        if self.further is not None:
            self._restore(request, lease, claim)
        if request.admitted < 0 and not request.handed:
            # What a grammar forced before is output, wherever its KV comes from.
            request.cached_tokens = min(cached, request.num_prompt)
            self.prompt_tokens += request.num_prompt
            self.cached_tokens += request.cached_tokens
        return True

    def _claim(self, request: Request, known: NDArray[np.int32], lease: Lease) -> Claim | None:
        """What tiers have behind the cached prefix."""
        if self.further is None:
            return None
        claim = self.further.claim(request.id, request.namespace, known, lease.shared, request.match_limit())
        if claim is not None and self.cache.windows:
            self.cache.skip(lease, lease.shared + claim.count)
        return claim

    def _restore(self, request: Request, lease: Lease, claim: Claim | None) -> None:
        """Pages of its own are filled in front of the step that it enters with: it has computed them, so to say."""
        assert self.further is not None
        if claim is not None:
            start, end = lease.shared, lease.shared + claim.count
            pages = np.stack([table[start:end] for table in lease.tables[: self.cache.paged]])
            self.further.restore(claim, pages, self.cache.own_state(lease) if self.cache.has_states else 0)
            self.slots.computed[request.slot] += claim.count * self.cache.page_size
            if request.admitted < 0 and not request.handed:
                request.cached_host, request.cached_storage = (
                    (claim.count - claim.stored) * self.cache.page_size,
                    claim.stored * self.cache.page_size,
                )
        self.further.admitted(request.id, lease.node)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.slots.page_size)

    def _failed(self, request: Request, error: Exception) -> None:
        """One request's planning raised: it ends, alone."""
        log.error("request %s failed while it was planned", request.id, exc_info=error)
        self.refused.append(Refusal(request, f"{type(error).__name__}: {error}", 500))

    # after the launch

    def _turn(self, plan: Plan) -> None:
        """The next step reads the states that this one writes."""
        slots, batch = self.slots, plan.batch
        ends = batch.prefix_lens + batch.query_lens
        if batch.drafts is not None:
            ends[batch.drafts > 0] = -1
        for slot, end in zip(batch.slots.tolist(), ends.tolist(), strict=True):
            self.cache.turn(slots.lease(slot), end)
        slots.moved = True

    def _advance(self, plan: Plan) -> None:
        """Rows that surely end are not launched again, those with drafts not before their commit; or all go on."""
        slots, batch = self.slots, plan.batch
        if batch.canvas is not None:
            self._advance_blocks(plan, batch.canvas)
            return
        at, yields = batch.slots, sure(batch.outputs)
        slots.computed[at] += batch.query_lens
        slots.length[at] += batch.outputs
        slots.next_token[at[yields]] = FROM_DEVICE
        for request, output in zip(plan.rows, batch.outputs.tolist(), strict=True):
            request.inflight += output
        ends = (slots.length[at] >= slots.limit[at]) & (yields | (slots.computed[at] >= slots.length[at]))
        self._steady = None
        alone = self.pace.draft_room > 0 or self.pace.waves > 1  # a row waits for its step
        if not plan.prefills and not ends.any() and yields.all() and not alone:
            self._steady = Steady.after(plan, slots)
            return
        for row in np.flatnonzero(ends).tolist():
            slots.retire(plan.rows[row].slot)
            if not yields[row]:
                plan.scored.add(row)
        if alone:
            for row in np.flatnonzero(yields).tolist():
                slots.hold(plan.rows[row].slot, STEP)
        self._commit(plan)

    def _advance_blocks(self, plan: Plan, canvas: NDArray[np.int32]) -> None:
        """Known blocks are computed; what becomes of a canvas is known at its commit."""
        batch = plan.batch
        self.slots.computed[batch.slots] += batch.query_lens - canvas
        for row in np.flatnonzero(canvas).tolist():
            plan.rows[row].inflight += 1
            self.slots.hold(plan.rows[row].slot, STEP)
        self._commit(plan)

    def _commit(self, plan: Plan) -> None:
        for request in plan.prefills:
            computed = int(self.slots.computed[request.slot])
            request.targets_from = max(request.targets_from, computed + 1)
            lease = self.slots.lease(request.slot)
            plan.given.append(self.cache.given(lease))
            try:
                self.cache.commit(lease, request.known, computed)
            except Exception as error:
                self._failed(request, error)

    def _give_back(self, plan: Plan, output: StepOutput) -> None:
        """Pages that no later token of these rows reads. Launched steps that have not run yet read on from there."""
        slots, batch = self.slots, plan.batch
        before = batch.prefix_lens
        after = before + batch.query_lens + np.maximum(output.counts - 1, 0)
        if batch.canvas is not None:
            after = before + batch.query_lens - batch.canvas  # whose next pass reads what this one read
        # A snapshot that a state began from was taken where whole pages end.
        due = before % slots.page_size == 0 if self.cache.has_states else np.zeros(len(before), dtype=np.bool_)
        for window in slots.windows:
            borders = [computed // slots.page_size * slots.page_size for computed in (before, after)]
            first = [np.maximum(0, border - window + 1) // slots.page_size for border in borders]
            due |= first[0] != first[1]
        for row in np.flatnonzero(due).tolist():
            request = plan.rows[row]
            if request.lease is not None and request.slot == batch.slots[row]:
                self.cache.behind(request.lease, int(after[row]))
                slots.moved = True


def _place(request: Request) -> tuple[float, int]:
    return request.place
