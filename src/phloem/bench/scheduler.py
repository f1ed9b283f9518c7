"""`phloem bench scheduler`: planner and prefix tree alone, at 10, 1,000 and 100,000 waiting requests and prefixes.

No model runs: a step's result is there at once. What is timed is what a step costs on the host, in CPU time: plan (with
cache lookups and admissions), batch arrays, advance, and commit with its messages.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from phloem.core.batch import Batch, StepOutput
from phloem.core.errors import BadRequest
from phloem.core.memory import Paged, groups_of
from phloem.core.messages import Submit
from phloem.core.request import SamplingParams
from phloem.kvcache import audit
from phloem.kvcache.manager import CacheManager
from phloem.scheduler.policies import POLICIES
from phloem.scheduler.scheduler import Scheduler, ScheduleSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.core.batch import Follower

T = TypeVar("T")
PAGE_SIZE = 16
VOCAB_SIZE = 32_000
PREFIX_TOKENS = 4 * PAGE_SIZE
GROUPS = 64  # waiting prompts share one of so many first halves
SIZES = (10, 1_000, 10_000, 100_000)


class _Done(Generic[T]):
    def __init__(self, output: T) -> None:
        self._output = output

    def done(self) -> bool:
        return True

    def result(self) -> T:
        return self._output


class NullRunner:
    """Samples token 1 for whoever samples, in no time."""

    page_size = PAGE_SIZE
    graph_bytes = draft_room = 0
    groups = groups_of((Paged(1, 1, 1),))

    def __init__(self, num_pages: int, max_slots: int) -> None:
        self.num_pages: tuple[int, ...] = (num_pages,)
        self.max_slots = max_slots

    @property
    def prepared(self) -> dict[str, Any]:
        return {}

    def launch(self, batch: Batch) -> _Done[StepOutput]:
        return _Done(StepOutput(batch.step, batch.outputs, batch.outputs[batch.outputs == 1]))

    def constrain(self, slot: int, follower: Follower | None) -> None:
        pass

    def between(self, work: Callable[[], T]) -> _Done[T]:
        return _Done(work())

    def read_weight(self, name: str, rows: int) -> NDArray[np.float32]:
        raise BadRequest(f"no weight is called {name!r}", param="name")

    def close(self) -> None:
        pass


def _timed(action: Callable[[], Any], repeat: int) -> list[float]:
    """Microseconds of each call: CPU time of this thread, which does not count what else the machine does."""
    taken: list[float] = []
    for _ in range(repeat):
        begin = time.thread_time_ns()
        action()
        taken.append((time.thread_time_ns() - begin) / 1e3)
    return taken


def _row(what: str, size: int, taken: Sequence[float]) -> dict[str, Any]:
    p50, p99 = np.percentile(taken, [50, 99])
    return {
        "bench": "scheduler",
        "what": what,
        "size": size,
        "p50_us": round(float(p50), 2),
        "p99_us": round(float(p99), 2),
        "mean_us": round(float(np.mean(taken)), 2),
        "count": len(taken),
    }


def _prompts(count: int, tokens: int, seed: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """[count, tokens]: the first half of each is one of GROUPS, the rest is its own."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(2, VOCAB_SIZE, (count, tokens), dtype=np.int32)
    groups = rng.integers(2, VOCAB_SIZE, (GROUPS, tokens // 2), dtype=np.int32)
    prompts[:, : tokens // 2] = groups[rng.integers(0, GROUPS, count)]
    return prompts


def bench_steps(waiting: int, policy: str, running: int, turnover: bool, steps: int) -> dict[str, Any]:
    """Steps with `waiting` requests in the queue. With `turnover` an eighth of the slots end, and fill again, each."""
    runner = NullRunner(64 * 1024, running)
    settings = ScheduleSettings(
        max_running_requests=running,
        context_length=64 * 1024,
        vocab_size=VOCAB_SIZE,
        max_queued_requests=1 << 30,
        chunked_prefill_size=2048,
        schedule_policy=policy,
        random_seed=1,
    )
    cache = CacheManager(runner.groups, runner.num_pages, PAGE_SIZE)
    scheduler = Scheduler(runner, settings, cache, lambda message: None)
    length = 8 if turnover else 32 * 1024
    if not turnover:
        scheduler.planner.headroom.share = scheduler.planner.headroom.low = 0.0
    for index, prompt in enumerate(_prompts(waiting + running, 128, seed=waiting)):
        params = SamplingParams(max_new_tokens=length - index % 4 if turnover else length)
        scheduler.receive(Submit(id=str(index), input_ids=prompt.tobytes(), sampling=params, priority=index % 3))
    for _ in range(20):
        scheduler.step()
    fresh = iter(_prompts(steps * running, 128, seed=7))
    taken: list[float] = []
    for step in range(steps):
        # Whoever was admitted is replaced, so that the queue keeps its length; that part is not timed.
        while turnover and scheduler.num_waiting < waiting:
            name, params = f"{step}-{scheduler.num_waiting}", SamplingParams(max_new_tokens=length)
            scheduler.receive(Submit(id=name, input_ids=next(fresh).tobytes(), sampling=params))
        taken += _timed(scheduler.step, 1)
    if turnover and scheduler.slots.num_running < running // 2 and waiting >= running:
        raise RuntimeError("the queue did not keep the slots busy: nothing was measured")
    kind = "admit and decode" if turnover else "decode"
    return _row(f"step, {kind}, {running} rows, {policy}", waiting, taken)


def bench_tree(cached: int, lookups: int) -> list[dict[str, Any]]:
    """Look up, insert and evict with `cached` prefixes of 4 pages in the tree."""
    pages = cached * 4 + 4096
    cache = CacheManager(NullRunner.groups, (pages,), PAGE_SIZE)
    table = np.zeros(64, dtype=np.int32)
    prompts = _prompts(cached + lookups, PREFIX_TOKENS, seed=3)

    def insert(prompt: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        lease = cache.match("", prompt, PREFIX_TOKENS, (table,))
        cache.reserve(lease, PREFIX_TOKENS)
        cache.release(lease, prompt, PREFIX_TOKENS)

    for prompt in prompts[:cached]:
        insert(prompt)
    order = np.random.default_rng(5).integers(0, cached, lookups).tolist()
    hits = iter(prompts[index] for index in order)
    found = _timed(lambda: cache.probe("", next(hits), PREFIX_TOKENS), lookups)
    news = iter(prompts[cached:])
    inserted = _timed(lambda: insert(next(news)), lookups)
    evicted = _timed(lambda: cache.allocators[0].free(cache.tree.evict(1)), min(lookups, cached))
    audit.check(cache, [])
    return [
        _row("tree: look up a prompt", cached, found),
        _row("tree: match, insert, release", cached, inserted),
        _row("tree: evict a page", cached, evicted),
    ]


def run(sizes: Sequence[int] = SIZES, steps: int = 300, running: int = 32) -> list[dict[str, Any]]:
    """Every measurement as one dictionary: what, size, p50_us, p99_us, mean_us, count."""
    rows: list[dict[str, Any]] = []
    gc.collect()
    gc.freeze()
    try:
        for size in sizes:
            rows.append(bench_steps(size, "fcfs", running, False, steps))
            rows += [bench_steps(size, policy, running, True, steps) for policy in POLICIES]
            rows += bench_tree(size, lookups=2000)
    finally:
        gc.unfreeze()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements for a human eye."""
    width = max(len(row["what"]) for row in rows)
    head = f"{'what':<{width}}  {'waiting / cached':>16}  {'p50 us':>9}  {'p99 us':>9}"
    lines = [
        f"{row['what']:<{width}}  {row['size']:>16,}  {row['p50_us']:>9.1f}  {row['p99_us']:>9.1f}"
        for row in sorted(rows, key=lambda row: str(row["what"]))
    ]
    return "\n".join([head, *lines])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="phloem bench scheduler", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="waiting requests, cached prefixes")
    parser.add_argument("--steps", type=int, default=300, help="timed steps per measurement")
    parser.add_argument("--running", type=int, default=32, help="rows of a step")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of the table")
    args = parser.parse_args(argv)
    rows = run(args.sizes, args.steps, args.running)
    if args.json:
        print("\n".join(json.dumps(row) for row in rows))
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
