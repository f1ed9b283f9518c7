"""Simulate a fleet in virtual time: the real scheduler, cache and gateway policies, steps that only take time.

Each policy gets the same conversations (or the same trace file). A replica's steps take what a JSON of measured
coefficients says, or what the formulae of `phloem plan` say of a model; docs/planning.md has both.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phloem.bench._report import context, write_line
from phloem.cli._options import parse_own
from phloem.core.config import opt
from phloem.core.errors import BadRequest, ConfigError
from phloem.core.targets import Targets
from phloem.planning.layouts import Layout, memory, stages
from phloem.planning.machines import GIB, machine
from phloem.planning.plan import Load, plan
from phloem.planning.shape import read_shape
from phloem.planning.steps import Costs, Efficiency
from phloem.router.policies import POLICIES
from phloem.router.settings import Settings
from phloem.scheduler.policies import POLICIES as ORDERS
from phloem.simulation.clockwork import Measured, Planned
from phloem.simulation.fleet import Fleet
from phloem.simulation.replica import Size
from phloem.simulation.traces import MIXES, Mix, conversations, read_trace, single
from phloem.utils import plots

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.simulation.clockwork import StepTime
    from phloem.simulation.seen import Seen
    from phloem.simulation.traces import Conversation


@dataclass(frozen=True)
class Options:
    replicas: int = opt(8, "Replicas behind the gateway.")
    policies: str = opt("round_robin,cache_aware", "The gateway's policies that are compared.")
    workload: str = opt("chat", f"Distributions of conversations: {', '.join(MIXES)}.")
    rate: float = opt(4.0, "Requests a second for each replica, all turns counted.")
    seconds: float = opt(60.0, "Within which conversations begin.")
    until: float = opt(0.0, "Cut the simulation off after so many seconds; 0: when every conversation has ended.")
    turns: float | None = opt(None, "Mean turns of a conversation, instead of the workload's.")
    think: float | None = opt(None, "Mean seconds between an answer and the next turn.")
    burst: float | None = opt(
        None, "Deviation of intervals between conversations over their mean; 1: a Poisson process."
    )
    systems: int | None = opt(None, "Different system prompts.")
    trace: str | None = opt(
        None, "A trace file of Mooncake's form instead: JSON lines with timestamp, lengths, hash_ids."
    )
    speed: float = opt(1.0, "How many times as fast the trace file is played.")
    seed: int = opt(0, "Of everything that is drawn: the same seed gives the same figures.")
    steps: str | None = opt(None, "JSON of measured step times: step, weights, token, row, read, pair, in seconds.")
    model: str | None = opt(None, "Or the model whose steps are computed by the formulae of `phloem plan`,")
    gpus: int = opt(1, "on so many GPUs a replica,")
    gpu: str = opt("h100", "of this kind,")
    layout: str | None = opt(None, "laid out so (tp=8,ep=8,attn_dp=8); default: the best one.")
    kv_tokens: int | None = opt(None, "KV memory of a replica in tokens; default: by the plan, or 400,000.")
    page_size: int = opt(64, "Tokens of a page.")
    max_running_requests: int = opt(256, "Most requests in one step of a replica.")
    context_length: int = opt(32768, "Longest prompt plus output; longer prompts lose their beginning.")
    chunked_prefill_size: int = opt(8192, "Tokens of one step.")
    mixed_prefill_size: int | None = opt(None, "Prompt tokens of a step that also decodes; default: the whole step.")
    schedule_policy: str = opt("lpm", "Order of a replica's waiting requests.")
    slo: str | None = opt(None, "What requests are promised, as `phloem serve` takes it.")
    long_rate: float = opt(0.0, "Long prompts a second for each replica beside the workload, of the class 'long',")
    long_tokens: int = opt(8192, "of so many tokens each.")
    max_queue_seconds: float = opt(0.0, "A replica refuses requests beyond such a predicted wait; 0: none.")
    kv_events: bool = opt(
        False, "The gateway follows the replicas' cache events, instead of guessing from what it sent."
    )
    max_tree_size: int | None = opt(None, "Pieces of prompts that the gateway remembers.")
    json: bool = opt(False, "Print JSON instead of the table.")
    output: str | None = opt(None, "File to append a JSON line to.")
    plot: str | None = opt(None, "PNG of times to the first token and of the replicas' load.")


def main(argv: list[str]) -> int:
    options = parse_own("bench simulate", argv, Options, __doc__ or "")
    policies = _checked(options)
    seconds, size = _replica(options)
    runs: dict[str, dict[str, Any]] = {}
    seen: dict[str, Seen] = {}
    for policy in policies:
        begun = time.process_time()
        settings = Settings() if options.max_tree_size is None else Settings(max_tree_size=options.max_tree_size)
        fleet = Fleet(size, seconds, options.replicas, policy, options.seed, options.kv_events, settings)
        seen[policy] = fleet.run(_talks(options), options.until)
        spent = time.process_time() - begun
        runs[policy] = seen[policy].told()
        runs[policy]["cost"] = {"steps": fleet.turns, "cpu_seconds": round(spent, 2),
                                "us_per_step": round(spent / max(fleet.turns, 1) * 1e6, 1)}  # fmt: skip
    record = {**context(), "bench": "simulate", "options": vars(options), "replica": asdict(size), "policies": runs}
    record["memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(record) if options.json else table(runs))
    if options.output:
        write_line(Path(options.output), record)
    if options.plot:
        plot(seen, Path(options.plot))
    return 0


def _checked(options: Options) -> list[str]:
    """The policies. Raises BadRequest or ConfigError, naming the option."""
    for name in ("replicas", "rate", "seconds", "speed", "page_size", "max_running_requests", "chunked_prefill_size"):
        if getattr(options, name) <= 0:
            raise BadRequest(f"{name} must be above 0", param=name)
    for name, value in vars(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRequest(f"{name}: {value} is no number", param=name)
    for name in ("output", "plot"):
        # Before minutes are spent on what could not be written.
        if (path := vars(options)[name]) and not os.access(Path(path).absolute().parent, os.W_OK):
            raise BadRequest(f"{name} {path}: its folder is not there, or not to be written to", param=name)
    if options.long_rate < 0 or options.long_tokens < 1:
        raise BadRequest("long_rate must not be below 0, long_tokens not below 1", param="long_rate")
    if options.until < 0:
        raise BadRequest("until must not be below 0", param="until")
    if options.context_length < 2 * options.page_size:
        raise BadRequest("context_length must hold two pages", param="context_length")
    if options.workload not in MIXES:
        raise BadRequest(f"workload {options.workload!r} is none of {', '.join(MIXES)}", param="workload")
    if options.schedule_policy not in ORDERS:
        raise BadRequest(f"schedule_policy {options.schedule_policy!r} is none of {', '.join(ORDERS)}")
    if options.steps and options.model:
        raise BadRequest("steps are measured or computed of a model: give one of the two", param="steps")
    policies = list(dict.fromkeys(name for name in options.policies.split(",") if name))
    for name in policies:
        POLICIES.check(name)
    if not policies:
        raise BadRequest("policies: none is named", param="policies")
    return policies


def _talks(options: Options) -> Iterable[Conversation]:
    if options.trace:
        return read_trace(Path(options.trace), options.speed)
    own = {name: getattr(options, name) for name in ("turns", "think", "burst", "systems")}
    mix: Mix = replace(MIXES[options.workload], **{name: value for name, value in own.items() if value is not None})
    if mix.turns < 1 or mix.burst <= 0 or mix.think < 0 or mix.systems < 0:
        raise BadRequest("turns must be at least 1, burst above 0, think and systems not below 0", param="turns")
    found = conversations(mix, options.rate * options.replicas, options.seconds, options.seed)
    if not options.long_rate:
        return found
    long = single(options.long_rate * options.replicas, options.long_tokens, options.seconds, "long")
    return heapq.merge(found, long, key=lambda talk: talk.start)


def _replica(options: Options) -> tuple[StepTime, Size]:
    size = Size(
        options.kv_tokens or 400_000, options.page_size, options.max_running_requests, options.context_length,
        options.chunked_prefill_size, options.schedule_policy, options.max_queue_seconds,
        options.mixed_prefill_size, Targets.parse(options.slo),
    )  # fmt: skip
    if options.model is None:
        return (Measured() if options.steps is None else Measured.load(Path(options.steps))), _fitting(size)
    found, shape = machine(options.gpu), read_shape(options.model)
    load = Load(context=min(options.context_length, shape.context), chunk=options.chunked_prefill_size)
    if options.layout is None:
        layout = plan(shape, found, options.gpus, load).prices[0].layout
    else:
        layout = plan(shape, found, options.gpus, load, only=Layout.parse(options.layout)).prices[0].layout
    layout = replace(layout, dp=1)
    parts = stages(shape, layout.pp)
    room = memory(shape, layout, parts, found.memory_gib * GIB * load.fraction, load.longest, load.chunk)
    tokens = int(room.kv / max(room.request / load.longest, 1e-9)) * layout.attn_dp
    print(f"replica: {layout} on {layout.world} x {found.name}, KV memory of {tokens:,} tokens", flush=True)
    size = replace(size, kv_tokens=options.kv_tokens or tokens)
    return Planned(Costs(shape, layout, parts, found, Efficiency())), _fitting(size)


def _fitting(size: Size) -> Size:
    if size.kv_tokens < size.context:
        raise ConfigError(
            f"kv_tokens {size.kv_tokens} hold no request of the context of {size.context}", param="kv_tokens"
        )
    return size


_ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("requests", ("requests",)),
    ("failed", ("failed",)),
    ("unfinished", ("unfinished",)),
    ("output tok/s", ("output_tok_per_s",)),
    ("hit rate", ("hit_rate",)),
    ("hit rate, one endless cache", ("ideal_hit_rate",)),
    *((f"{name} {part}, ms", (key, part)) for name, key in (("TTFT", "ttft_ms"), ("ITL", "itl_ms"), ("E2E", "e2e_ms"))
      for part in ("p50", "p90", "p99")),
    ("preemptions", ("preemptions",)),
    ("busy, mean", ("load", "busy_mean")),
    ("busy, fullest replica", ("load", "busy_max")),
    ("running, fullest over mean", ("load", "running_max_over_mean")),
    ("requests, most of a replica", ("load", "requests_max")),
    ("requests, fewest", ("load", "requests_min")),
    ("steps", ("cost", "steps")),
    ("CPU seconds", ("cost", "cpu_seconds")),
)  # fmt: skip


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The policies side by side."""
    first = next(iter(runs.values()))
    lines = [["", *runs]]
    for label, path in _ROWS:
        cells: list[str] = []
        for run in runs.values():
            value: Any = run
            for key in path:
                value = value.get(key, "-")
            cells.append(f"{value:,}" if isinstance(value, int | float) else str(value))
        lines.append([label, *cells])
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    head = f"{first['mean_prompt']:,.0f} tokens in, {first['mean_output']:,.0f} out in the mean\n"
    return head + "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def plot(runs: dict[str, Seen], path: Path) -> None:
    """How times to the first token are distributed, and how much each replica had to do, as a PNG."""
    pyplot = plots.pyplot()

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for name, seen in runs.items():
        shares = [(place + 1) / len(seen.ttft) for place in range(len(seen.ttft))]
        left.plot(sorted(value * 1e3 for value in seen.ttft), shares, label=name)
        points = [share / 200 for share in range(1, 200)]
        middle.plot([seen.gaps.percentile(share) * 1e3 for share in points], points, label=name)
        right.plot(sorted((value / max(seen.end, 1e-9) for value in seen.busy), reverse=True), label=name)
    left.set(title="time to first token", xlabel="ms", ylabel="share of requests", xscale="log")
    middle.set(title="gaps between tokens", xlabel="ms", ylabel="share of gaps", xscale="log")
    right.set(
        title="busy share of each replica", xlabel="replica, the fullest first", ylabel="share of time", ylim=(0, None)
    )
    left.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
