"""Receive, plan, launch, commit. Overlap is the order of the last three: see `step`.

Requests advance when they are launched; the values of their tokens arrive when the step is committed. With overlap
on, step n+1 is planned and launched while n runs, and takes n's tokens on the device. A request that will surely end at
n (its length says so) is not in n+1; one that ends by a value (end of sequence, a stop token) is found at the commit of
n, and what n+1 computes for it is dropped.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from phloem.core import denoising
from phloem.core.errors import BadRequest, EngineDead, OutOfMemory, PhloemError, QueueFull
from phloem.core.media import reach
from phloem.core.messages import Abort, Control, Drain, FromEngine, Submit, ToEngine
from phloem.core.request import FinishReason, RequestStatus
from phloem.kvcache import audit
from phloem.kvcache.manager import namespace
from phloem.scheduler import blocks, overload, traced
from phloem.scheduler.control import ABORTED, Controls
from phloem.scheduler.lending import Lending, lend
from phloem.scheduler.metrics import Meter, usage, weights
from phloem.scheduler.mixture import Mixture
from phloem.scheduler.plan import Plan
from phloem.scheduler.planner import Planner
from phloem.scheduler.policies import POLICIES
from phloem.scheduler.recovery import roll_back
from phloem.scheduler.results import Results
from phloem.scheduler.service import Service
from phloem.scheduler.settings import ScheduleSettings, check
from phloem.scheduler.state import LATE, Request, Slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from phloem.core.adapters import Lender
    from phloem.core.batch import Pending, Runner, StepOutput
    from phloem.core.late import Late, Prepared
    from phloem.core.updates import Keeper
    from phloem.disagg.encoders import Encoders
    from phloem.kvcache.events import Feed
    from phloem.kvcache.manager import CacheManager
    from phloem.scheduler.control import Capturer, Recorder
    from phloem.scheduler.further import Further
    from phloem.scheduler.remote import Remote

T = TypeVar("T")
log = logging.getLogger(__name__)

SEED_MASK = 2**63 - 1
READY_CHECKS = 256  # late requests that are asked `ready()` in one step
SHUTTING_DOWN = FinishReason("abort", message="the server is shutting down", status_code=503)


@dataclass(slots=True)
class Launched:
    """A step between launch and commit."""

    plan: Plan
    pending: Pending[StepOutput]
    mark: int = 0  # of the feed of cache events
    copied: Pending[None] | None = None  # what it reads that was not computed


class Scheduler:
    """Owns every request from `Submit` to its last chunk. One thread calls it.

    `prepare(submit, prompt)` gives what a request must wait for and what its output keeps to; None: nothing. A
    `PhloemError` that it raises answers the request. `wait_for` adds to the former at any time. `lender` has the
    adapters, where any are served; `keeper` changes the weights, where that can be done.
    """

    encoders: Encoders | None = None  # other servers encode media; `prepare` waits for them

    def __init__(
        self,
        runner: Runner,
        settings: ScheduleSettings,
        cache: CacheManager,
        send: Callable[[FromEngine], None],
        clock: Callable[[], float] = time.monotonic,
        prepare: Callable[[Submit, NDArray[np.int32]], Prepared | None] | None = None,
        lender: Lender | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.runner = runner
        self.settings = settings
        self.cache = cache
        self.send = send
        self.clock = clock
        self.prepare = prepare
        self.lender = lender
        self.feed: Feed | None = None  # tells gateways what is cached
        self.recorder: Recorder | None = None  # counts how often experts are chosen
        self.capturer: Capturer | None = None  # writes hidden states for trainers of heads
        self.keeper = keeper
        self.live: dict[str, Request] = {}
        self.queue = settings.queue
        self.late: deque[Request] = deque()  # those that wait for something, with or without a slot
        self.inflight: deque[Launched] = deque()
        self.paused = False
        self.stopped = False
        self._drain_until: float | None = None
        self._weight_version = ""
        # The last token of a request never needs a page: nothing attends to it.
        fits = cache.pages_for(settings.context_length - 1) <= cache.most_pages
        self._most_tokens = settings.context_length if fits else cache.most_pages * cache.page_size + 1
        if settings.block:
            self._most_tokens = min(self._most_tokens, cache.most_pages * cache.page_size)
        if settings.block % denoising.WHOLE:  # canvases are whole blocks
            self._most_tokens = blocks.whole(self._most_tokens, settings.block)
        slots = min(settings.max_running_requests, runner.max_slots) // (parts := len(cache.parts)) * parts
        self.slots = Slots(
            slots, self._most_tokens, cache.page_size, runner.groups, settings.block, settings.canvas, parts
        )
        self._lasting = any(group.kind == "pages" and not group.window for group in runner.groups)
        self._policy = POLICIES[settings.schedule_policy]
        pace = settings.pace(slots, runner.draft_room)
        mixture = Mixture(self.slots, lender.most) if lender is not None and lender.most < slots else None
        self.planner = Planner(self.slots, self.queue, cache, self._policy, pace, settings.eos_ids, mixture)
        self.planner.lending = None if lender is None else Lending(lender, self._place, self.wait_for)
        interval = settings.stream_interval
        self.results = Results(self.live, self.slots, self.queue, self.planner.release, interval, lender)
        self.results.speculates = settings.speculates
        self.remote: Remote | None = None  # prompts are computed for others, or by others
        self.duty: Callable[[str], dict[str, Any]] | None = None  # changes which of the two
        self.controls = Controls(self)
        self.meter = Meter(clock())
        self._service = Service(self.planner, self.meter, settings.targets)
        self._random = random.Random(settings.random_seed)
        self._eos = frozenset(settings.eos_ids)
        self._sequence = 0
        self._step_began = 0.0
        self._cornered: Request | None = None  # failed with one token, alone, in the step before

    # state

    @property
    def num_waiting(self) -> int:
        return len(self.queue) + len(self.late) - self.slots.num_held(LATE)

    @property
    def busy(self) -> bool:
        """Whether anything would happen without a new message."""
        if self.inflight or self.controls.waiting or self._drain_until is not None:
            return True
        if self.remote is not None and self.remote.busy:
            return True
        return bool(self.live) and not self.paused and not self.asleep

    @property
    def asleep(self) -> bool:
        """Whether what steps need has been given back: requests wait."""
        return self.keeper is not None and not self.keeper.asleep.isdisjoint(("weights", "kv_cache"))

    @property
    def nothing_held(self) -> bool:
        """No request holds pages and no step is in flight."""
        return not self.inflight and self.slots.num_running == 0

    @property
    def busy_seconds(self) -> float:
        """How long the oldest launched step has been running."""
        return self.clock() - self._step_began if self.inflight else 0.0

    def state(self) -> dict[str, Any]:
        """For the server-info endpoint."""
        return {
            "running": self.slots.num_running,
            "waiting": self.num_waiting,
            "paused": self.paused,
            **weights(self.keeper),
            "max_running_requests": self.slots.count,
            "graph_bytes": self.runner.graph_bytes,
            "prepared": self.runner.prepared,
            **self.meter.state(),
            **usage(self.cache),
            **self.planner.state(),
            **self.results.state(),
            **({} if self.lender is None else self.lender.state()),
            **({} if self.further is None or self.remote is not None else {"tiers": self.further.state()}),
            **({} if self.remote is None else {"disaggregation": self.remote.state()}),
            **({} if self.encoders is None else {"encoders": self.encoders.state()}),
        }

    @property
    def further(self) -> Further | None:
        """Cache tiers beyond the pool, where there are any."""
        return self.planner.further

    @further.setter
    def further(self, further: Further | None) -> None:
        self.planner.further = further

    @property
    def weight_version(self) -> str:
        """Which weights compute: prefixes are shared only among requests of one version."""
        return self._weight_version

    @weight_version.setter
    def weight_version(self, version: str) -> None:
        self._weight_version = version
        for request in self.live.values():
            self._place(request)
            if request.slot < 0 and self.planner.lending is not None:
                self.planner.lending.renew(request)

    def _place(self, request: Request) -> None:
        """Where its prefixes are looked for, from its next admission on."""
        adapter = "" if request.adapter is None else request.adapter.uid
        request.namespace = namespace(request.submit.namespace, adapter, self._weight_version)
        request.match_version = -1

    def settle(self) -> None:
        """Take in every launched step and tell what it gave: what is told from now on was computed later."""
        while self.inflight:
            self._commit(self.inflight.popleft())
        self.results.tell_all()
        self.flush_results()

    def between(self, work: Callable[[], T]) -> Pending[T]:
        """Run `work` behind every step launched so far and before every later one, with none in flight.

        Called in the scheduler's thread, which goes on meanwhile; `Controls.between` answers a call by it.
        """
        return self.runner.between(work)

    # receive

    def receive(self, message: ToEngine) -> None:
        """Take one message. A bad one is answered and harms nobody."""
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Abort):
            self._abort(message)
        elif isinstance(message, Control):
            self.controls.handle(message)
        elif isinstance(message, Drain):
            self._drain_until = self.clock() + message.timeout

    def _submit(self, submit: Submit) -> None:
        try:
            if submit.id in self.live:
                # Their chunks could not be told apart, so neither can be served.
                self.results.finish(self.live[submit.id], ABORTED, answer=False)
                raise BadRequest(f"request id {submit.id!r} is in use", param="rid")
            if self._drain_until is not None:
                self.results.refuse(submit.id, QueueFull(str(SHUTTING_DOWN.message)))
                return
            if self.keeper is not None and self.keeper.unfit:
                self.results.refuse(submit.id, QueueFull(self.keeper.unfit))
                return
            before = overload.Before(self.queue, self.slots, self.meter, self.planner.fresh)
            overload.check(self.settings, self.num_waiting, before, submit, self.live)
            self._accept(submit)
        except PhloemError as error:
            self.results.refuse(submit.id, error)
        except Exception as error:
            log.exception("request %s could not be taken in", submit.id)
            self.results.refuse(submit.id, PhloemError(f"{type(error).__name__}: {error}"))

    def _accept(self, submit: Submit) -> None:
        request = Request(submit, self.clock())
        check(request, self.settings, self.cache, self._most_tokens, self.lender)
        request.unshared = submit.return_routed and not self._lasting
        params = request.params
        further = self.settings.context_length - reach(submit.media, request.num_prompt)
        room = min(self._most_tokens - request.num_prompt, further)
        if self.settings.canvas > self.settings.block:
            room = blocks.whole(room, self.settings.canvas)
        most = params.max_new_tokens
        if most is None:
            most = denoising.USUAL_ANSWER if self.settings.block == denoising.WHOLE else room
        request.limit = request.num_prompt + min(most, room)
        request.stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        if self.settings.whole_pictures:
            spans = [(start, start + size) for item in submit.media for start, size in item.spans]
            request.whole = tuple(sorted(spans))
        seed = params.sampling_seed
        request.seed = self._random.getrandbits(63) if seed is None else seed & SEED_MASK
        self._sequence += 1
        self._service.accept(request)
        request.seq, request.key = self._sequence, self._policy.key(request)
        prepared = self.prepare(submit, request.prompt) if self.prepare is not None else None
        if prepared is not None:
            request.waits, request.constraint = prepared.waits, prepared.constraint
            request.plain = request.plain and request.constraint is None
        if submit.adapter:
            lend(self.lender, request)
        self._place(request)
        if self.further is not None:
            late = self.further.fetch(request.id, request.namespace, request.prompt, request.match_limit())
            request.waits += () if late is None else (late,)
        if self.remote is not None:
            self._meet(request)
        self.live[request.id] = request
        if not request.waits and not self._begin(request):
            return
        self.planner.wait_again(request)
        if request.waits:
            self.late.append(request)

    def _meet(self, request: Request) -> None:
        """Where it is to meet another server: it is offered, or waited for. Raises BadRequest."""
        assert self.remote is not None
        try:
            self.remote.accept(request)
        except PhloemError:
            if request.adapter is not None and self.lender is not None:
                self.lender.give_back(request.adapter)
            raise

    def _abort(self, message: Abort) -> None:
        if message.all:
            self.abort_all(ABORTED)
        elif message.id in self.live:
            self.results.finish(self.live[message.id], ABORTED, answer=False)
        else:
            log.debug("abort of %s: it has ended already, or never was", message.id)

    def abort_all(self, reason: FinishReason) -> int:
        """End every request with this reason; each is told. Gives how many."""
        requests = list(self.live.values())
        for request in requests:
            self.results.finish(request, reason)
        return len(requests)

    def retract_all(self) -> None:
        """Every running request goes back to the queue with what it has; its pages are free."""
        for request in self.slots.active_requests():
            self.planner.preempt(request)

    # one turn of the loop

    def step(self) -> bool:
        """Plan and launch what can run, commit what was launched before, send the news. False: nothing moved.

        Plain: the step launched here is committed here. Overlapped: it stays in flight until the next turn, so that
        the device has work while the host plans; of a runner with stages, until each of them may have one.
        """
        begin = self.clock()
        self._poll_late()
        launched = self._launch_next()
        keep = max(1, self.planner.pace.waves - 1) if self.settings.overlap else 0
        keep = keep if launched else max(0, len(self.inflight) - 1)
        worked = launched or bool(self.inflight)
        while len(self.inflight) > keep:
            self._commit(self.inflight.popleft())
        if worked and not self.inflight and self.settings.overlap and self.planner.pace.draft_room:
            self._launch_next()  # behind what is known now: whoever is told of it works while that runs
        self.controls.poll()
        if self.further is not None:
            self.further.turn(self.inflight[0].plan.mark if self.inflight else None, self.live)
        if self.remote is not None:
            self.remote.turn()
        if self.feed is not None and not self.inflight:
            self.feed.publish()
        self._poll_drain()
        if self.settings.debug_invariants:
            self.check()
        self.flush_results()
        end = self.clock()
        self.meter.turn(begin, end, worked)
        if self.meter.due(end, bool(self.live)):
            self.send(self._stats(end))
        return worked

    def check(self) -> None:
        """Verify the page accounting. Raises AssertionError."""
        leases = [request.lease for request in self.slots.running() if request.lease is not None]
        for part in self.cache.parts:
            audit.check(part, [lease for lease in leases if lease.part == part.number])

    def flush_results(self) -> None:
        self.results.flush(self.send)

    def _stats(self, now: float) -> FromEngine:
        counts: dict[str, Any] = {
            "running": self.slots.num_running,
            "waiting": self.num_waiting,
            "waiting_tokens": self.queue.tokens,
            **self.results.drafts(),
        }
        counts |= usage(self.cache) | ({} if self.further is None else {"tiers": self.further.stats()})
        return self.meter.stats(now, bool(self.live), self.results.output_tokens, counts, self.planner.state())

    def wait_for(self, request_id: str, late: Late) -> None:
        """Launch nothing more of a live request until this is ready; a running one keeps slot and pages meanwhile.

        Raises:
            KeyError: if the request has ended.
        """
        request = self.live[request_id]
        if not request.waits:
            self.late.append(request)
        request.waits += (late,)
        if request.slot >= 0:
            self.slots.hold(request.slot, LATE)
        elif request.status is RequestStatus.WAITING:
            self.queue.remove(request)
            request.status = RequestStatus.WAITING_ON

    def _poll_late(self) -> None:
        for _ in range(min(len(self.late), READY_CHECKS)):
            request = self.late.popleft()
            if request.finished:
                continue
            error: Exception | None = None
            try:
                there = [late for late in request.waits if late.ready()]
                request.waits = tuple(late for late in request.waits if late not in there)
                error = next((late.error for late in there if late.error is not None), None)
            except Exception as raised:
                log.exception("request %s: what it waited for failed", request.id)
                error = raised
            if error is not None:
                if not isinstance(error, PhloemError):
                    error = BadRequest(f"{type(error).__name__}: {error}")
                self.results.fail(request, error.message, error.status, error.param, error.code)
            elif request.waits:
                self.late.append(request)
            elif request.slot >= 0:
                self.slots.resume(request.slot, LATE)
            elif self._arrived(request) and self._begin(request):
                self.planner.wait_again(request)

    def _arrived(self, request: Request) -> bool:
        traced.waited(request, self.clock())
        return self.remote is None or self.remote.arrived(request, self.results)

    def _begin(self, request: Request) -> bool:
        """Append what is forced at the beginning of an output; False where the request has ended by it."""
        constraint = request.constraint
        if constraint is None or not constraint.can_jump or request.admitted >= 0:
            return True
        if self.remote is not None and not self.remote.forces(request):
            return True
        try:
            return not self.results.jump(request)
        except BadRequest as refused:  # its grammar
            self.results.fail(request, refused.message, refused.status, refused.param, refused.code)
        except Exception as raised:
            log.exception("request %s: what is forced at its beginning could not be found", request.id)
            self.results.fail(request, f"{type(raised).__name__}: {raised}", 500)
        return False

    def _launch_next(self) -> bool:
        if self.paused or self.asleep:
            return False
        plan: Plan | None = None
        try:
            self.planner.give_room(self.runner.draft_room)
            self._service.turn(self.clock())
            plan = self.planner.next_batch()
        except Exception as error:
            self._start_over(self.slots.running(), error, "planning failed")
        self._end_refused()
        if plan is None:
            return False
        now = self.clock()
        for request in plan.entered:
            request.admit(now)
        try:
            for slot, follower in plan.followers:
                self.runner.constrain(slot, follower)
            copied = None if self.further is None else self.further.launching()
            pending = self.runner.launch(plan.batch)
        except Exception as error:
            self._start_over(plan.rows, error, f"step {plan.batch.step} could not be launched")
            return True
        if not self.inflight:
            self._step_began = now
        self.inflight.append(Launched(plan, pending, copied=copied))
        self.planner.advance(plan)
        self._end_refused()
        if self.feed is not None:
            self.inflight[-1].mark = self.feed.mark
        return True

    def _end_refused(self) -> None:
        if self.planner.refused:
            refused, self.planner.refused = self.planner.refused, []
            for item in refused:
                self.results.fail(item.request, item.message, item.status_code)

    def _commit(self, launched: Launched) -> None:
        try:
            if launched.copied is not None:
                launched.copied.result()
            output: StepOutput = launched.pending.result()
        except OutOfMemory as error:
            self._run_again(launched, error)
            return
        except Exception as error:
            self._start_over(launched.plan.rows, error, f"step {launched.plan.batch.step} failed")
            return
        begun, self._step_began = self._step_began, self.clock()
        traced.step(launched.plan, begun, self._step_began)
        batch = launched.plan.batch
        self.meter.step_done(output, batch.num_prompt_tokens if batch.canvas is None else 0)
        self._service.saw(batch, output.forward_seconds)
        self.planner.throttle.passed()
        self._cornered = None
        self.planner.committed(launched.plan, output)
        if output.verified is not None:
            self.results.verified(launched.plan, output)
        if self.remote is not None:
            self.remote.computed(launched.plan)
        self.results.commit(launched.plan, output)
        if self.feed is not None:
            self.feed.publish(launched.mark)

    def _run_again(self, failed: Launched, error: OutOfMemory) -> None:
        """A step did not fit into memory: it and those behind it never happened; the next ones are smaller.

        A request that does not fit alone, with a single token, twice in a row, ends.
        """
        batch, alone = failed.plan.batch, None
        self.meter.out_of_memory += 1
        roll_back(self.slots, self.cache, [failed.plan, *self._drop_inflight()])
        self.planner.throttle.failed(batch.num_tokens)
        self.planner.undone()
        self._step_began = self.clock()
        size = f"step {batch.step} ({batch.num_rows} rows, {batch.num_tokens} tokens)"
        least = self.settings.whole_prompts or batch.num_tokens <= 2 * self.settings.canvas
        if batch.num_tokens == 1 or (least and batch.num_rows == 1):
            alone = failed.plan.rows[0]
        if alone is None or alone is not self._cornered:
            most = self.planner.throttle.budget
            log.warning("out of memory in %s: %s; run again with at most %d tokens", size, error.message, most)
            self._cornered = alone
            return
        log.error("out of memory in %s: %s; no smaller step is possible", size, error.message)
        if not alone.finished:
            least = "its tokens" if batch.num_tokens > 1 else "one token"
            message = f"out of memory: not even a step of this request alone, with {least}, fits ({error.message})"
            self.results.fail(alone, message, error.status)

    def _start_over(self, victims: list[Request], error: Exception, what: str) -> None:
        """A whole step failed: its requests end, and as no KV can be trusted, all others are computed again. Raises
        EngineDead where the runner itself has gone: nothing can be served again."""
        if isinstance(error, EngineDead):
            raise error
        log.error("%s", what, exc_info=error)
        for plan in self._drop_inflight():
            for request in plan.rows:
                request.forget_inflight()
        self.planner.epoch += 1
        victims = [request for request in victims if not request.finished]
        running = self.slots.running()
        leases = [request.lease for request in running if request.lease is not None]
        for request in running:
            self.slots.leave(request)
            request.forget_inflight()
            self.planner.wait_again(request)
        self.cache.reset(leases)
        for request in victims:
            self.results.fail(request, f"the step failed: {type(error).__name__}: {error}", 500)

    def _drop_inflight(self) -> list[Plan]:
        """Wait for the steps that were launched behind a failed one; what they give is not looked at."""
        plans: list[Plan] = []
        for launched in self.inflight:
            try:
                launched.pending.result()
            except OutOfMemory:
                pass  # refused by the runner
            except Exception:
                log.exception("step %d, launched after a failed one, failed too", launched.plan.batch.step)
            plans.append(launched.plan)
        self.inflight.clear()
        return plans

    def _poll_drain(self) -> None:
        if self._drain_until is None:
            return
        if self.live and self.clock() >= self._drain_until:
            self.abort_all(SHUTTING_DOWN)
        if not self.live and not self.inflight:
            self.controls.give_up()
            if self.further is not None:
                self.further.finish()
            self.stopped = True
