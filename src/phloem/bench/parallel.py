"""Time decode steps of a model that ranks share out: what their meetings take of a step, and what each rank has read.

Runs the same steps on one rank first, with as many threads as the machine has. Times of meetings are rank 0's: they
hold its waiting for the others.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from phloem.bench._report import context as machine_context
from phloem.bench._report import write_line
from phloem.bench.step import WARM, DecodeSteps
from phloem.bench.step import Options as StepOptions
from phloem.checkpoint.describe import describe
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.distributed.shm import SharedMemory
from phloem.engine import worker
from phloem.engine.ranks.parallel import LeadingModel, ParallelRunner, encode_told, ranks_of, refuse
from phloem.engine.ranks.plans import Packing
from phloem.engine.runner import ModelRunner
from phloem.launch.ranks import RankProcesses

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.batch import Batch, Runner
    from phloem.core.config import Config
    from phloem.distributed.comm import Comm
    from phloem.distributed.groups import Groups
    from phloem.engine.ranks.parallel import Told
    from phloem.kernels.native_meeting import Spent

T = TypeVar("T")

SUMS = "tp all_reduce"
BATCHES = (1, 2, 4)  # that the rows are dealt out in, where there are stages
TOLD, PAUSE = 50, 0.001  # batches of each kind that are sent without a step, and seconds between two


@dataclass(frozen=True)
class Options:
    batch: int = opt(1, "Rows of a decode step.")
    context: int = opt(256, "Tokens that each row has already.")
    steps: int = opt(32, "Decode steps that count.")
    output: str | None = opt(None, "File to append a JSON line to.")


class Times:
    """Calls, seconds and bytes of each kind of meeting."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def clear(self) -> None:
        for counter in (self.calls, self.seconds, self.bytes):
            counter.clear()

    def of(self, kind: str, size: int, call: Callable[[], T]) -> T:
        begun = perf_counter()
        found = call()
        self.calls[kind] += 1
        self.seconds[kind] += perf_counter() - begun  # pyright: ignore[reportArgumentType]
        self.bytes[kind] += size
        return found

    def take(self, before: Spent | None, after: Spent | None) -> float | None:
        """Sums that count themselves; gives the seconds of them in which others were waited for, None: nobody knows."""
        if before is None or after is None:
            return None
        self.calls[SUMS] += after.calls - before.calls
        self.bytes[SUMS] += after.bytes - before.bytes
        self.seconds[SUMS] += after.seconds - before.seconds  # pyright: ignore[reportArgumentType]
        return after.waited - before.waited


def spent(groups: Groups) -> Spent | None:
    """Of the sums of a stage's ranks so far, where they are native calls."""
    return groups.tp.spent if isinstance(groups.tp, SharedMemory) else None


class Timed:
    """A rank's end of a group (`distributed.comm.Comm`), whose calls are timed."""

    def __init__(self, inner: Comm, group: str, times: Times) -> None:
        self._inner, self._group, self._times = inner, group, times
        self.name, self.rank, self.size, self.records = inner.name, inner.rank, inner.size, inner.records
        self.undoing, self.device = inner.undoing, inner.device
        self.host: Comm = self if inner.host is inner else inner.host

    def _of(self, call: str, x: Tensor, work: Callable[[], T]) -> T:
        return self._times.of(f"{self._group} {call}", x.nbytes, work)

    def check(self) -> None:
        self._inner.check()

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.records and x.dtype == torch.float32:
            return self._inner.all_reduce(x)  # what a recording holds is counted by itself (`spent`)
        return self._of("all_reduce", x, lambda: self._inner.all_reduce(x))

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return self._of("all_gather", x, lambda: self._inner.all_gather(x))

    def gather(self, x: Tensor) -> list[Tensor] | None:
        return self._of("gather", x, lambda: self._inner.gather(x))

    def all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        size = sum(part.nbytes for part in parts)
        return self._times.of(f"{self._group} all_to_all", size, lambda: self._inner.all_to_all(parts))

    def broadcast(self, x: Tensor) -> Tensor:
        return self._of("broadcast", x, lambda: self._inner.broadcast(x))

    def abort(self) -> None:
        self._inner.abort()


def timed(groups: Groups, times: Times) -> Groups:
    """The same ends, with their calls timed."""
    ends = {spec.name: getattr(groups, spec.name) for spec in fields(groups)}
    replaced: dict[str, Any] = {name: Timed(end, name, times) for name, end in ends.items() if name != "rank" and end}
    return replace(groups, **replaced)


def main(argv: list[str]) -> int:
    config, options = parse("bench parallel", argv, Options, skip=("server",), description=__doc__ or "")
    if min(options.batch, options.steps, options.context) < 1:
        raise BadRequest("batch, steps and context must be at least 1")
    if ranks_of(config) == 1:
        raise BadRequest("this measures several ranks: --tp-size or --pp-size above 1")
    record = {**machine_context(), "model": Path(config.model.model_path).name, **measure(config, options)}
    print(json.dumps(record))
    if options.output:
        write_line(Path(options.output), record)
    return 0


def measure(config: Config, options: Options) -> dict[str, Any]:
    """Milliseconds of a step on one rank and on several, their meetings, and the bytes that each rank has read.

    Raises:
        ConfigError: ranks of these sizes cannot be.
    """
    steps = StepOptions(batch=options.batch, context=options.context, steps=options.steps, prefill=0)
    size = config.cache.page_size or 64
    length = options.context + WARM + options.steps + size
    wanted = {
        "max_running_requests": options.batch,
        "max_total_tokens": config.cache.max_total_tokens or options.batch * (length // size + 1) * size + size,
    }
    config = config.with_(**wanted)
    model = config.model
    checkpoint = describe(model.model_path, model.load_format, model.revision, model.tokenizer_path)
    refuse(config, checkpoint)
    alone = config.with_(tp_size=1, pp_size=1, ep_size=1, attn_dp_size=1, attn_cp_size=1, nnodes=1, use_ray=False)
    built = worker.build(alone, checkpoint, lambda phase, seconds: None)
    try:
        one = DecodeSteps(built.runner, steps).seconds()
    finally:
        built.runner.close()
    return {
        **{name: getattr(config.runtime, name) for name in ("tp_size", "pp_size", "ep_size")},
        **{name: getattr(options, name) for name in ("batch", "context", "steps")},
        "one_rank_ms": one * 1e3,
        **_together(config, checkpoint, steps),
    }


def _together(config: Config, checkpoint: Checkpoint, steps: StepOptions) -> dict[str, Any]:
    ranks, times = RankProcesses(config), Times()
    try:
        team = replace(ranks.team, groups=timed(ranks.team.groups, times))
        built = worker.build(config, checkpoint, lambda phase, seconds: None, team)
        runner = Telling(built.runner, team.tell)
        try:
            decode = DecodeSteps(runner, steps)
            decode.seconds()
            times.clear()
            runner.words.clear()
            before, begun = spent(ranks.team.groups), perf_counter()
            decode.run(1, steps.steps)
            seconds = perf_counter() - begun
            waited = times.take(before, spent(ranks.team.groups))
            meetings = _meetings(times, steps.steps, seconds)
            told = {"launched": runner.words.seconds["plan"] / runner.words.calls["plan"] * 1e6, **runner.alone()}
            stages = _stages(runner, built.runner, ranks, steps)
        finally:
            runner.close()
    finally:
        ranks.close()
    return {
        "ranks_ms": seconds / steps.steps * 1e3,
        "comm": ranks.team.groups.ends[0].name,
        "meetings": meetings,
        "meetings_share": sum(one["share"] for one in meetings),
        "waited_share": None if waited is None else waited / seconds,
        "bytes_read": ranks.bytes_read,
        "told_us": told,
        **stages,
    }


def _meetings(times: Times, steps: int, seconds: float) -> list[dict[str, Any]]:
    """Of so many steps, the kind that takes longest first. Where there are stages rank 0 waits for some of them in a
    thread of their own, beside its steps."""
    return [
        {
            "what": kind,
            "calls": times.calls[kind] / steps,
            "us": times.seconds[kind] / times.calls[kind] * 1e6,
            "bytes": times.bytes[kind] / times.calls[kind],
            "share": times.seconds[kind] / seconds,
        }
        for kind in sorted(times.calls, key=lambda kind: -times.seconds[kind])
    ]


def _stages(runner: ParallelRunner, inner: Runner, ranks: RankProcesses, steps: StepOptions) -> dict[str, Any]:
    """Of several stages, by how many batches the rows are dealt out in: milliseconds of a step of all rows, and the
    share of the time in which each stage computes (of several ranks, its first). As many batches as stages are on
    their way at a time; one batch is waited for."""
    if not isinstance(inner, ModelRunner) or not isinstance(inner.model, LeadingModel) or inner.waves == 1:
        return {}
    model, each = inner.model, ranks.team.mesh.tp.size
    firsts = range(each, ranks.size, each)

    def busy() -> list[float]:
        others = ranks.busy()
        return [model.busy, *(others[rank] for rank in firsts if rank in others)]

    found: list[dict[str, Any]] = []
    for batches in (count for count in BATCHES if count <= steps.batch):
        decode = DecodeSteps(runner, steps, batches)
        decode.run(0, WARM)
        before, begun = busy(), perf_counter()
        decode.run(WARM, steps.steps)
        seconds = perf_counter() - begun
        shares = [(after - then) / seconds for then, after in zip(before, busy(), strict=True)]
        found.append({"batches": batches, "step_ms": seconds / steps.steps * 1e3, "busy": shares})
    return {"waves": inner.waves, "stages": found}


class Telling(ParallelRunner):
    """One whose words to the other ranks are timed: a batch as bytes, encoded and sent."""

    def __init__(self, inner: Runner, tell: Callable[[Told], None]) -> None:
        super().__init__(inner, tell)
        self.words = Times()
        self._last: Batch | None = None

    def send(self, batch: Batch) -> None:
        self._last = batch
        self.words.of("plan", 0, lambda: super(Telling, self).send(batch))

    def alone(self) -> dict[str, float]:
        """Microseconds of it while no step runs, medians: of the rows of the last step, of those where a row has a new
        page, and of other rows; and of `..._encoded` to make the bytes alone. The rest of it is sending, which wakes
        ranks that sleep after `PAUSE`. Those batches are never run."""
        last = self._last
        assert last is not None
        found: dict[str, list[float]] = {}
        for send, what in ((super().send, ""), (_encoder(), "_encoded")):
            for turn in range(3 * TOLD):
                kind = ("steady", "page", "new")[turn % 3]
                last = _next(last, kind)
                begun = perf_counter()
                send(last)
                found.setdefault(kind + what, []).append(perf_counter() - begun)
                sleep(PAUSE)
        return {name: sorted(values)[len(values) // 2] * 1e6 for name, values in found.items()}


def _encoder() -> Callable[[Batch], object]:
    """What makes bytes of batches, and sends them nowhere."""
    packing = Packing()
    return lambda batch: encode_told(packing.pack(batch))


def _next(batch: Batch, kind: str) -> Batch:
    """The step after: of the same rows, where one of them has another page, or of other rows."""
    lens = batch.prefix_lens + 1
    if kind == "steady":
        return replace(batch, prefix_lens=lens)
    tables = tuple(table.copy() for table in batch.tables)
    if kind == "page":
        tables[0][0, -1] += 1
        return replace(batch, prefix_lens=lens, tables=tables)
    arrays = {name: getattr(batch, name)[::-1].copy() for name in ("slots", "query_lens", "outputs")}
    return replace(batch, prefix_lens=lens[::-1], tables=tuple(table[::-1] for table in tables), **arrays)
