"""Trace single steps of a model: where a decode step's time goes, and how long the device waits for the host.

With --limits, on a CPU, steps run in turns with the machine's own limits, and their share of those is printed.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, deque
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.bench import _floors
from phloem.bench._report import context as machine_context
from phloem.bench._report import write_line
from phloem.bench._timeline import device_figures, host_ops, idle_share
from phloem.bench._trace import traced
from phloem.checkpoint.describe import describe
from phloem.cli._options import parse
from phloem.core.batch import FROM_DEVICE, Admission, Batch
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.engine import worker
from phloem.engine.recorded.graphs import RecordedStep
from phloem.engine.runner import ModelRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.core.batch import Pending, Runner, StepOutput
    from phloem.core.config import Config

WARM = 16  # decode steps before those that count: graphs are recorded and kernels compiled in them
PREFILLS = 3
REPLAYS = 9  # over which a recorded step's ops are timed


@dataclass(frozen=True)
class Options:
    batch: int = opt(1, "Rows of a decode step.")
    context: int = opt(1024, "Tokens that each row has already.")
    steps: int = opt(32, "Decode steps that are traced.")
    prefill: int = opt(512, "Tokens of a prefill step, of one request; 0: none.")
    trace: str | None = opt(
        None, "File for the trace of the decode steps, to be opened in Perfetto (.json or .json.gz)."
    )
    top: int = opt(8, "Kernels or ops to name.")
    limits: bool = opt(False, "Compare with what this CPU can read and compute, measured in turns with the steps.")
    turns: int = opt(5, "Turns of --limits.")
    output: str | None = opt(None, "File to append a JSON line to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench step", argv, Options, skip=("server",), description=__doc__ or "")
    if min(options.batch, options.steps, options.context, options.turns) < 1 or options.prefill < 0:
        raise BadRequest("batch, steps, context and turns must be at least 1, prefill at least 0")
    record = {**machine_context(), "model": Path(config.model.model_path).name, **measure(config, options)}
    if not options.limits:
        _show(record)
    print(json.dumps({key: value for key, value in record.items() if key != "top"}))
    if options.output:
        write_line(Path(options.output), record)
    return 0


def measure(config: Config, options: Options) -> dict[str, Any]:
    """Build the engine's runner (no scheduler, no HTTP) and run steps through it, each launched while one runs."""
    length = max(options.context + WARM + options.steps + 1, options.prefill)
    size = config.cache.page_size or 64
    wanted = {
        "max_running_requests": options.batch,
        "max_total_tokens": config.cache.max_total_tokens or options.batch * (length // size + 1) * size + size,
        "chunked_prefill_size": max(options.prefill, options.batch),
    }
    config = config.with_(**wanted)
    model = config.model
    checkpoint = describe(model.model_path, model.load_format, model.revision, model.tokenizer_path)
    if length > (model.context_length or checkpoint.context_length):
        most = model.context_length or checkpoint.context_length
        raise BadRequest(f"{length} tokens a row are more than this model's context of {most}")
    built = worker.build(config, checkpoint, lambda phase, seconds: None)
    try:
        record: dict[str, Any] = {"batch": options.batch, "context": options.context, "steps": options.steps}
        record["quantization"] = config.model.quantization
        record |= {key: built.info[key] for key in ("device", "dtype", "kv_cache_dtype")}
        record["cpu_level"] = next((d.value for d in built.decisions if d.name == "cpu_level"), None)
        if not isinstance(built.runner, ModelRunner):
            raise BadRequest("steps are measured of models that generate")
        decode = DecodeSteps(built.runner, options)
        if options.limits:
            return record | {"prefill": options.prefill} | _against_limits(built.runner, decode, options)
        if options.prefill:
            record |= _prefill(built.runner, options.prefill)
        return record | _traced(decode, options)
    finally:
        built.runner.close()


def _against_limits(runner: ModelRunner, decode: DecodeSteps, options: Options) -> dict[str, Any]:
    work = _floors.work_of(runner.model, runner.pool)

    def prefill() -> None:
        _prefill_once(runner, options.prefill, 0)

    decode.run(0, WARM)
    if options.prefill:
        prefill()
    # The steps that are timed begin behind the warm ones, and each is longer by a token.
    context = options.context + WARM + options.steps // 2
    found = _floors.shares(work, options.batch, context, options.prefill, options.turns, decode.seconds, prefill)
    _floors.show(found, options.batch, options.prefill)
    return found


def _tables(runner: Runner, rows: int, length: int) -> tuple[np.ndarray[Any, np.dtype[np.int32]], ...]:
    """A table for each group of the runner's memory: pages that nobody else has, as far as there are so many."""
    found: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    for group, count in zip(runner.groups, runner.num_pages, strict=True):
        width = 2 if group.kind == "state" else -(-length // runner.page_size)
        pages = (np.arange(rows * width) % (count - 1) + 1).reshape(rows, width).astype(np.int32)
        found.append(pages[:, :1].repeat(2, 1) if group.kind == "state" else pages)
    return tuple(found)


def _prefill_once(runner: Runner, tokens: int, number: int) -> float:
    """Seconds of one prefill step of one request."""
    ids = np.ones(tokens, np.int32)
    one = np.zeros(1, np.int32)
    entry = Admission(0, "prefill", SamplingParams(temperature=0.0), 1, ids, tokens)
    batch = Batch(number, one, one + tokens, one, ids, _tables(runner, 1, tokens), one + 1, [entry])
    begun = perf_counter()
    runner.launch(batch).result()
    return perf_counter() - begun


def _prefill(runner: Runner, tokens: int) -> dict[str, Any]:
    """The fastest of a few; the first one compiles."""
    best = min(_prefill_once(runner, tokens, number) for number in range(PREFILLS))
    return {"prefill": tokens, "prefill_ms": best * 1e3, "prefill_tok_per_s": tokens / best}


class DecodeSteps:
    """Decode steps of all rows, each launched while the one before it runs. In several `waves` a step has one of so
    many parts of the rows, in turn, and as many steps are on their way."""

    def __init__(self, runner: Runner, options: Options, waves: int = 1) -> None:
        self._waves = waves
        self._runner, self._start, self._steps = runner, options.context, options.steps
        rows = options.batch
        self._tables = _tables(runner, rows, options.context + WARM + options.steps + 1)
        self._slots, self._ones = np.arange(rows, dtype=np.int32), np.ones(rows, np.int32)
        greedy, known = SamplingParams(temperature=0.0), np.ones(options.context + 1, np.int32)
        self._entries = [Admission(int(slot), f"row {slot}", greedy, 1, known, options.context) for slot in self._slots]
        # As the scheduler does: while the same rows decode, batches have the same arrays.
        self._parts = [
            (self._slots[part], self._ones[part], tuple(table[part] for table in self._tables), self._entries[part])
            for part in (slice(wave, None, waves) for wave in range(waves))
        ]

    def _batch(self, number: int, wave: int) -> Batch:
        slots, ones, tables, entries = self._parts[wave]
        first = number == 0
        ids = np.full(len(slots), 1 if first else FROM_DEVICE, np.int32)
        lens = np.full(len(slots), self._start + number, np.int32)
        return Batch(number * self._waves + wave, slots, ones, lens, ids, tables, ones, entries if first else [])

    def run(self, begin: int, count: int) -> list[StepOutput]:
        """So many steps of each row."""
        outputs: list[StepOutput] = []
        pending: deque[Pending[StepOutput]] = deque()
        for number in range(begin, begin + count):
            for wave in range(self._waves):
                pending.append(self._runner.launch(self._batch(number, wave)))
                if len(pending) > self._waves:
                    outputs.append(pending.popleft().result())
        return [*outputs, *(one.result() for one in pending)]

    def seconds(self) -> float:
        """Of one step, over as many as are asked for; the first ones are not counted."""
        self.run(0, WARM)
        begun = perf_counter()
        self.run(WARM, self._steps)
        return (perf_counter() - begun) / self._steps


def _traced(decode: DecodeSteps, options: Options) -> dict[str, Any]:
    decode.run(0, WARM)
    begun = perf_counter()
    untraced = decode.run(WARM, options.steps)
    wall = perf_counter() - begun
    replays: list[tuple[float, float]] = []
    window: list[float] = []

    def work() -> None:
        window.append(perf_counter())
        decode.run(WARM, options.steps)
        window.append(perf_counter())

    recorded: list[RecordedStep[Any, Any]] = []
    with _replays_into(replays, recorded):
        trace = traced(work, Path(options.trace) if options.trace else None)
    found: dict[str, Any] = {"wall_ms": wall / options.steps * 1e3, "tok_per_s": options.batch * options.steps / wall}
    device = device_figures(trace, options.steps, options.top)
    found |= device or {}
    if device is None:
        forward = sum(output.forward_seconds for output in untraced)
        found["outside_forward"] = max(0.0, 1.0 - forward / wall)
        found["outside_replay"] = idle_share(replays, (window[0], window[1])) if replays else None
        found["replayed_steps"] = len(replays)
        timed = getattr(recorded[-1].graph, "replay_timed", None) if recorded else None
        found["top"] = _timed_ops(timed, options.top) if timed else host_ops(trace, options.steps, options.top)
    return found


def _timed_ops(replay_timed: Callable[[], list[tuple[str, bool, int]]], top: int) -> list[dict[str, Any]]:
    """A recorded step's largest ops: milliseconds (medians over replays) and calls of a step."""
    runs: list[dict[str, int]] = []
    calls: Counter[str] = Counter()
    for _ in range(REPLAYS):
        times: Counter[str] = Counter()
        calls.clear()
        for name, _alone, nanoseconds in replay_timed():
            times[name] += nanoseconds
            calls[name] += 1
        runs.append(times)
    found = {name: median(run[name] for run in runs) / 1e6 for name in calls}
    largest = sorted(found, key=lambda name: -found[name])[:top]
    return [{"name": name, "ms": found[name], "count": calls[name]} for name in largest]


@contextlib.contextmanager
def _replays_into(found: list[tuple[float, float]], steps: list[RecordedStep[Any, Any]]) -> Generator[None]:
    """Note when recorded steps are replayed, and which, and mark them in the trace."""
    from torch.profiler import record_function

    replay = RecordedStep.replay

    def noted(step: RecordedStep[Any, Any], *sizes: int) -> Any:
        begun = perf_counter()
        with record_function(f"replay of a step of {step.size} rows"):
            given = replay(step, *sizes)
        found.append((begun, perf_counter()))
        steps.append(step)
        return given

    RecordedStep.replay = noted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        RecordedStep.replay = replay


def _show(record: dict[str, Any]) -> None:
    if "prefill" in record:
        print(f"prefill of {record['prefill']} tokens: {record['prefill_ms']:.2f} ms")
    head = f"decode of {record['batch']} rows at {record['context']} tokens: {record['wall_ms']:.3f} ms a step"
    if "device_idle" not in record:
        outside = record["outside_replay"]
        where = f"{record['outside_forward']:.1%} outside the forward pass"
        if outside is not None:
            where += f"; traced: {outside:.1%} outside the native step replay"
        else:
            where += "; the steps ran eagerly, none was replayed"
        print(f"{head}, {where}")
        _show_top(record)
        return
    print(
        f"{head}; traced: device busy {record['device_busy_ms']:.3f} of {record['device_wall_ms']:.3f} ms, "
        f"idle {record['device_idle']:.1%}, {record['launches']:.1f} launches, {record['kernels']:.1f} kernels a step"
    )
    _show_top(record)


def _show_top(record: dict[str, Any]) -> None:
    for kernel in record["top"]:
        print(f"  {kernel['ms']:8.4f} ms  {kernel['count']:6.1f} times  {kernel['name'][:100]}")
