"""The planner alone: no runner, no messages. And the queue and policies that feed it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from phloem.core.batch import FROM_DEVICE
from phloem.core.memory import Paged, groups_of
from phloem.core.messages import Submit, pack_ids
from phloem.core.request import RequestStatus, SamplingParams
from phloem.kvcache import audit
from phloem.kvcache.manager import CacheManager
from phloem.scheduler.plan import Pace, Plan
from phloem.scheduler.planner import Planner
from phloem.scheduler.policies import MAX_PRIORITY, PATIENCE, POLICIES, PRIORITY_SECONDS, WINDOW, YIELDS, WaitingQueue
from phloem.scheduler.state import Request, Slots

S = 4


class Desk:
    """A planner with everything it needs; `launch` plans and advances, `land` gives every row its token."""

    def __init__(self, pages: int = 100, slots: int = 8, budget: int = 16, policy: str = "fcfs") -> None:
        groups = groups_of((Paged(1, 1, 1),))
        self.cache = CacheManager(groups, (pages,), S)
        self.queue = WaitingQueue()
        self.slots = Slots(slots, pages * S, S, groups)
        self.policy = POLICIES[policy]
        self.planner = Planner(self.slots, self.queue, self.cache, self.policy, Pace(budget, budget, budget), (2,))
        self.made = 0

    def add(
        self,
        prompt: list[int],
        max_new: int = 8,
        priority: int = 0,
        at: float = 0.0,
        logprob_start: int = -1,
        namespace: str = "",
    ) -> Request:
        submit = Submit(
            id=f"r{self.made}",
            input_ids=pack_ids(prompt),
            sampling=SamplingParams(max_new_tokens=max_new),
            priority=priority,
            return_logprob=logprob_start >= 0,
            logprob_start=logprob_start,
            namespace=namespace,
        )
        request = Request(submit, at)
        self.made += 1
        request.seq, request.key = self.made, self.policy.key(request)
        request.limit = len(prompt) + max_new
        self.queue.add(request)
        return request

    def launch(self) -> Plan:
        plan = self.planner.next_batch()
        assert plan is not None
        self.planner.advance(plan)
        for request in plan.rows:
            request.admitted = 0.0
        audit.check(self.cache, [request.lease for request in self.slots.running() if request.lease is not None])
        return plan

    def land(self, plan: Plan) -> None:
        for row, request in enumerate(plan.rows):
            if plan.batch.outputs[row]:
                request.inflight -= 1
                request.output.append(7)
                if request.slot >= 0 and not request.inflight:
                    self.slots.next_token[request.slot] = 7


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    batch = plan.batch
    rows = zip(plan.rows, batch.prefix_lens.tolist(), batch.query_lens.tolist(), batch.outputs.tolist(), strict=True)
    return [(request.id, prefix, count, bool(outputs)) for request, prefix, count, outputs in rows]


def test_a_prompt_is_prefilled_in_chunks_within_the_budget() -> None:
    desk = Desk(budget=16)
    desk.add(list(range(10, 50)))
    assert shape(desk.launch()) == [("r0", 0, 16, False)]
    assert shape(desk.launch()) == [("r0", 16, 16, False)]
    last = desk.launch()
    assert shape(last) == [("r0", 32, 8, True)]
    assert last.batch.input_ids.tolist() == list(range(42, 50)) and last.batch.tables[0].shape == (1, 10)


def test_decodes_come_first_and_chunks_fill_the_rest() -> None:
    desk = Desk(budget=16)
    desk.add([11, 12, 13])
    desk.land(desk.launch())
    desk.add(list(range(10, 50)))
    plan = desk.launch()
    assert shape(plan) == [("r0", 3, 1, True), ("r1", 0, 15, False)]
    assert plan.batch.input_ids[0] == 7 and not plan.batch.is_decode
    assert [admission.request_id for admission in plan.batch.admissions] == ["r1"]
    plan = desk.launch()
    assert shape(plan)[0] == ("r0", 4, 1, True) and plan.batch.input_ids[0] == FROM_DEVICE


def test_nothing_to_do_gives_no_batch() -> None:
    assert Desk().planner.next_batch() is None


def test_a_request_that_will_surely_end_is_not_launched_again() -> None:
    desk = Desk()
    request = desk.add([11, 12, 13], max_new=2)
    desk.launch()
    desk.launch()
    assert desk.planner.next_batch() is None
    assert request.slot >= 0 and request.inflight == 2


def test_an_unsampled_request_ends_after_its_prompt() -> None:
    desk = Desk(budget=4, slots=4)
    request = desk.add([11, 12, 13, 14, 15], max_new=0)
    assert not desk.launch().scored
    plan = desk.launch()
    assert shape(plan) == [("r0", 4, 1, False)] and plan.scored == {0}
    assert desk.planner.next_batch() is None and request.inflight == 0


def test_requests_that_share_a_prefix_in_one_moment_compute_it_once() -> None:
    desk = Desk(budget=64)
    shared = list(range(100, 112))
    for index in range(4):
        desk.add([*shared, 50 + index])
    first = desk.launch()
    assert shape(first) == [("r0", 0, 13, True)]
    second = desk.launch()
    assert shape(second) == [("r0", 13, 1, True)] + [(f"r{index}", 12, 1, True) for index in (1, 2, 3)]


def test_a_shared_prefix_is_computed_once_through_chunks_too() -> None:
    desk = Desk(budget=8)
    shared = list(range(100, 132))
    desk.add([*shared, 50])
    desk.add([*shared, 51])
    computed = 0
    for _ in range(9):
        plan = desk.launch()
        computed += sum(plan.batch.query_lens[plan.batch.query_lens > 1].tolist()) if len(plan.rows) else 0
        if desk.slots.num_running == 2:
            break
    assert desk.slots.num_running == 2 and computed <= 33
    assert desk.slots.at(1).cached_tokens == 32


def test_waiting_for_a_shared_prefix_does_not_hold_up_others() -> None:
    desk = Desk(budget=64)
    desk.add([*range(100, 112), 1])
    desk.add([*range(100, 112), 3])
    desk.add([*range(200, 212), 4])
    assert [request.id for request in desk.launch().rows] == ["r0", "r2"]


def test_namespaces_do_not_wait_for_each_other() -> None:
    desk = Desk(budget=64)
    desk.add([*range(100, 112), 1], namespace="a")
    desk.add([*range(100, 112), 1], namespace="b")
    assert len(desk.launch().rows) == 2


def test_no_request_overtakes_one_that_does_not_fit() -> None:
    desk = Desk(pages=20, budget=64)
    desk.add(list(range(100, 140)), max_new=4)
    desk.launch()
    desk.add(list(range(200, 240)), max_new=4)
    desk.add([1, 3, 4], max_new=4)
    assert [request.id for request in desk.launch().rows] == ["r0"]


def test_out_of_pages_the_last_in_order_returns_to_the_queue_and_keeps_its_tokens() -> None:
    desk = Desk(pages=9, budget=64)
    desk.planner.headroom.share = desk.planner.headroom.low = 0.0
    first = desk.add(list(range(100, 114)), max_new=40)
    second = desk.add(list(range(200, 214)), max_new=40)
    for _ in range(4):
        desk.land(desk.launch())
    assert [first.status, second.status] == [RequestStatus.RUNNING, RequestStatus.WAITING]
    assert second.output == [7, 7, 7] and second.slot == -1 and desk.planner.preemptions == 1
    assert len(desk.queue) == 1


def test_pages_of_an_ending_request_are_awaited_rather_than_taken_from_another() -> None:
    desk = Desk(pages=9, budget=64)
    ending = desk.add(list(range(100, 115)), max_new=2)
    other = desk.add(list(range(200, 215)), max_new=40)
    plans = [desk.launch()]
    desk.land(plans[0])
    plans.append(desk.launch())  # position 15 of both; `ending` will surely end with it
    assert desk.planner.next_batch() is None and desk.planner.preemptions == 0 and other.slot >= 0
    desk.land(plans[1])
    desk.planner.release(ending)
    assert shape(desk.launch()) == [("r1", 16, 1, True)]


def test_nobody_is_admitted_into_pages_that_a_preemption_has_just_freed() -> None:
    desk = Desk(pages=9, budget=64)
    desk.planner.headroom.share = desk.planner.headroom.low = 0.0
    for start in (100, 200):
        desk.add(list(range(start, start + 14)), max_new=40)
    for _ in range(2):
        desk.land(desk.launch())
    desk.launch()
    desk.add([11, 12], max_new=2)
    assert [request.id for request in desk.launch().rows] == ["r0"] and desk.planner.preemptions == 1


def test_a_preempted_request_waits_for_its_token_in_flight() -> None:
    desk = Desk(budget=64)
    request = desk.add([11, 12, 13])
    plan = desk.launch()
    desk.planner.preempt(request)
    assert desk.planner.next_batch() is None
    desk.land(plan)
    again = desk.launch()
    assert shape(again) == [("r0", 0, 4, True)] and again.batch.admissions[0].tokens.tolist() == [11, 12, 13, 7]


def test_prompt_targets_are_asked_once_and_limit_the_match() -> None:
    desk = Desk(budget=64)
    prompt = list(range(100, 113))
    desk.add(prompt)
    desk.launch()
    request = desk.add(prompt, logprob_start=8)
    plan = desk.launch()
    row = plan.rows.index(request)
    # Position 8's logprob is read at position 7, so only the first whole page may come from the cache.
    assert shape(plan)[row] == ("r1", 4, 9, True)
    assert plan.batch.prompt_targets[row].tolist() == [-1, -1, -1, *range(108, 113), -1]
    desk.land(plan)
    desk.planner.preempt(request)
    plan = desk.launch()
    assert not plan.batch.prompt_targets


def test_prompt_targets_in_chunks_cover_every_position() -> None:
    desk = Desk(budget=8)
    request = desk.add(list(range(100, 121)), logprob_start=0)
    found: list[int] = []
    for _ in range(3):
        plan = desk.launch()
        row = plan.rows.index(request)
        assert len(plan.batch.prompt_targets[row]) == plan.batch.query_lens[row]
        found += [token for token in plan.batch.prompt_targets[row].tolist() if token >= 0]
    assert found == list(range(101, 121))


def test_what_fails_in_planning_is_refused_alone() -> None:
    desk = Desk(budget=64)
    bad, good = desk.add([11, 12, 13]), desk.add([21, 22, 23])
    bad.submit.token_ids_logprob = None  # type: ignore[assignment]
    plan = desk.launch()
    assert plan.rows == [good]
    assert [item.request for item in desk.planner.refused] == [bad]
    assert bad.slot == -1


def test_a_decode_only_batch_says_so() -> None:
    desk = Desk()
    desk.add([11, 12, 13])
    desk.add([21, 22, 23])
    desk.launch()
    plan = desk.launch()
    assert plan.batch.is_decode and plan.batch.slots.dtype == np.int32


# the queue and the policies


def test_queue_keeps_its_order_under_random_use() -> None:
    desk, rng = Desk(), random.Random(5)
    queue, model = WaitingQueue(), []
    requests = [desk.add([1], at=float(rng.randrange(50))) for _ in range(3000)]
    for request in requests:
        queue.add(request)
        model.append(request)
        if rng.random() < 0.7 and model:
            model.sort(key=lambda item: (item.key, item.seq))
            gone = model.pop(rng.choice([0, 0, 0, len(model) // 2, -1]))
            queue.remove(gone)
    model.sort(key=lambda item: (item.key, item.seq))
    assert queue.everything() == model and len(queue) == len(model)
    with pytest.raises(KeyError):
        queue.remove(next(request for request in requests if request not in model))


def test_priority_goes_first_but_waiting_makes_up_for_it() -> None:
    desk = Desk(policy="priority", slots=1)
    low = desk.add([1], priority=0, at=0.0)
    high = desk.add([3], priority=1, at=1.0)
    late = desk.add([4], priority=1, at=PRIORITY_SECONDS + 1.0)
    assert desk.queue.everything() == [high, low, late]
    huge = desk.add([5], priority=10**9, at=MAX_PRIORITY * PRIORITY_SECONDS + 5.0)
    assert desk.queue.everything() == [high, low, late, huge]


def test_who_is_far_more_important_takes_a_running_ones_place() -> None:
    desk = Desk(policy="priority", slots=2)
    low, lower = desk.add([11, 12, 13]), desk.add([14, 15, 16], priority=-1, at=0.5)
    desk.land(desk.launch())
    near = desk.add([21, 22], priority=YIELDS - 2, at=1.0)
    desk.land(desk.launch())
    assert near.slot < 0, "it is not so much more important"
    high = desk.add([31, 32], priority=YIELDS + 3, at=1.0)
    plan = desk.launch()
    assert {request.id for request in plan.rows} == {low.id, high.id} and desk.planner.preemptions == 1
    desk.land(plan)
    assert desk.queue.everything() == [near, lower] and lower.output, "it goes on from what it has said"
    desk.planner.release(high)
    desk.planner.release(low)
    plan = desk.launch()
    assert {request.id for request in plan.rows} == {near.id, lower.id}
    assert desk.planner.preemptions == 1


def test_who_has_waited_for_long_is_not_driven_out() -> None:
    desk = Desk(policy="priority", slots=1)
    old = desk.add([11, 12], at=0.0)
    desk.land(desk.launch())
    high = desk.add([31, 32], priority=YIELDS, at=YIELDS * PRIORITY_SECONDS + 1.0)
    assert desk.launch().rows == [old] and high.slot < 0


def test_the_important_get_pages_of_the_others_too() -> None:
    desk = Desk(policy="priority", slots=4, pages=10, budget=64)
    low = desk.add(list(range(10, 38)), priority=0)
    desk.land(desk.launch())
    high = desk.add(list(range(50, 74)), priority=YIELDS, at=1.0)
    plan = desk.launch()
    assert plan.rows == [high] and low.slot < 0 and desk.planner.preemptions == 1


def test_other_policies_drive_nobody_out() -> None:
    desk = Desk(policy="fcfs", slots=1)
    low = desk.add([11, 12])
    desk.land(desk.launch())
    desk.add([31, 32], priority=MAX_PRIORITY, at=1.0)
    assert desk.launch().rows == [low] and not desk.planner.preemptions


def test_longest_prefix_goes_first() -> None:
    desk = Desk(policy="lpm", slots=4, budget=64)
    cached = desk.add(list(range(100, 116)), max_new=1)
    desk.land(desk.launch())
    desk.planner.release(cached)
    desk.add([1, 3, 4, 5, 6])
    desk.add([*range(100, 104), 9])
    desk.add([*range(100, 112), 9])
    assert [request.id for request in desk.launch().rows] == ["r3", "r2", "r1"]


def test_longest_prefix_starves_nobody() -> None:
    desk = Desk(policy="lpm", slots=1, budget=64, pages=2000)
    hot = list(range(100, 116))
    cached = desk.add(hot, max_new=1)
    desk.land(desk.launch())
    desk.planner.release(cached)
    cold = desk.add([1, 3, 4, 5, 6], max_new=1)
    for _ in range(10):
        desk.add([*hot, 9], max_new=1)
    admitted: list[Request] = []
    while cold not in admitted and len(admitted) < 2 * PATIENCE:
        plan = desk.launch()
        desk.land(plan)
        desk.planner.release(plan.rows[0])
        admitted.append(plan.rows[0])
        desk.add([*hot, 9], max_new=1)
    assert len(admitted) == PATIENCE + 1


def test_ranking_costs_a_bounded_number_of_lookups() -> None:
    desk = Desk(policy="lpm", slots=1, budget=64, pages=4000)
    for index in range(5 * WINDOW):
        desk.add([index + 1, 3, 4, 5, 6])
    calls = 0
    probe = desk.cache.probe

    def counted(*args: object) -> object:
        nonlocal calls
        calls += 1
        return probe(*args)  # type: ignore[arg-type]

    desk.cache.probe = counted  # type: ignore[method-assign,assignment]
    desk.launch()
    assert 0 < calls <= WINDOW
