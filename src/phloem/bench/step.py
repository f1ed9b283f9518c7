"""Trace single steps of a model: where a decode step's time goes, and how long the device waits for the host."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.bench._report import context as machine_context
from phloem.bench._report import write_line
from phloem.bench._timeline import device_figures, idle_share
from phloem.cli._options import parse
from phloem.core.batch import FROM_DEVICE, Admission, Batch
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams

if TYPE_CHECKING:
    from phloem.core.batch import Runner, StepOutput
    from phloem.core.config import Config

WARM = 8  # decode steps before those that count: graphs are recorded and kernels compiled in them
PREFILLS = 3


@dataclass(frozen=True)
class Options:
    batch: int = opt(1, "Rows of a decode step.")
    context: int = opt(1024, "Tokens that each row has already.")
    steps: int = opt(32, "Decode steps that are traced.")
    prefill: int = opt(512, "Tokens of a prefill step, of one request; 0: none.")
    trace: str | None = opt(
        None, "File for the trace of the decode steps, to be opened in Perfetto (.json or .json.gz)."
    )
    top: int = opt(8, "Kernels to name.")
    output: str | None = opt(None, "File to append a JSON line to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench step", argv, Options, skip=("server",), description=__doc__ or "")
    if min(options.batch, options.steps, options.context) < 1 or options.prefill < 0:
        raise BadRequest("batch, steps and context must be at least 1, prefill at least 0")
    record = {**machine_context(), "model": config.model.model_path, **measure(config, options)}
    _show(record)
    print(json.dumps({key: value for key, value in record.items() if key != "top"}))
    if options.output:
        write_line(Path(options.output), record)
    return 0


def measure(config: Config, options: Options) -> dict[str, Any]:
    """Build the engine's runner (no scheduler, no HTTP) and run steps through it, each launched while one runs."""
    from phloem.engine import worker
    from phloem.utils.checkpoint import describe

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
        record |= {key: built.info[key] for key in ("device", "dtype", "kv_cache_dtype")}
        if options.prefill:
            record |= _prefill(built.runner, options.prefill)
        return record | _decode(built.runner, options)
    finally:
        built.runner.close()


def _table(runner: Runner, rows: int, length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    width = -(-length // runner.page_size)
    return (np.arange(rows * width) % (runner.num_pages - 1) + 1).reshape(rows, width).astype(np.int32)


def _prefill(runner: Runner, tokens: int) -> dict[str, Any]:
    """The fastest of a few; the first one compiles."""
    ids = np.ones(tokens, np.int32)
    one, yes = np.zeros(1, np.int32), np.ones(1, np.bool_)
    entry = Admission(0, "prefill", SamplingParams(temperature=0.0), 1, ids, tokens)
    times: list[float] = []
    for number in range(PREFILLS):
        batch = Batch(number, one, one + tokens, one, ids, _table(runner, 1, tokens), yes, [entry])
        begun = perf_counter()
        runner.launch(batch).result()
        times.append(perf_counter() - begun)
    return {"prefill": tokens, "prefill_ms": min(times) * 1e3, "prefill_tok_per_s": tokens / min(times)}


def _decode(runner: Runner, options: Options) -> dict[str, Any]:
    from phloem.bench._trace import traced

    rows, start = options.batch, options.context
    table = _table(runner, rows, start + WARM + options.steps + 1)
    slots, ones = np.arange(rows, dtype=np.int32), np.ones(rows, np.int32)
    greedy = SamplingParams(temperature=0.0)
    known = np.ones(start + 1, np.int32)
    entries = [Admission(int(slot), f"row {slot}", greedy, 1, known, start) for slot in slots]

    def batch(number: int) -> Batch:
        first = number == 0
        ids = np.full(rows, 1 if first else FROM_DEVICE, np.int32)
        lens = np.full(rows, start + number, np.int32)
        return Batch(number, slots, ones, lens, ids, table, ones.astype(np.bool_), entries if first else [])

    def run(begin: int, count: int) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        pending = runner.launch(batch(begin))
        for number in range(begin + 1, begin + count):
            following = runner.launch(batch(number))
            outputs.append(pending.result())
            pending = following
        return [*outputs, pending.result()]

    run(0, WARM)
    begun = perf_counter()
    untraced = run(WARM, options.steps)
    wall = perf_counter() - begun
    replays: list[tuple[float, float]] = []
    window: list[float] = []

    def work() -> None:
        window.append(perf_counter())
        run(WARM, options.steps)
        window.append(perf_counter())

    with _replays_into(replays):
        trace = traced(work, Path(options.trace) if options.trace else None)
    found: dict[str, Any] = {"wall_ms": wall / options.steps * 1e3, "tok_per_s": rows * options.steps / wall}
    device = device_figures(trace, options.steps, options.top)
    found |= device or {}
    if device is None:
        forward = sum(output.forward_seconds for output in untraced)
        found["outside_forward"] = max(0.0, 1.0 - forward / wall)
        found["outside_replay"] = idle_share(replays, (window[0], window[1])) if replays else None
        found["replayed_steps"] = len(replays)
    return found


@contextlib.contextmanager
def _replays_into(found: list[tuple[float, float]]) -> Generator[None]:
    """Note when recorded steps are replayed, and mark them in the trace."""
    from torch.profiler import record_function

    from phloem.engine.graphs import RecordedStep

    replay = RecordedStep.replay

    def noted(step: RecordedStep[Any, Any]) -> Any:
        begun = perf_counter()
        with record_function(f"replay of a step of {step.rows} rows"):
            given = replay(step)
        found.append((begun, perf_counter()))
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
        return
    print(
        f"{head}; traced: device busy {record['device_busy_ms']:.3f} of {record['device_wall_ms']:.3f} ms, "
        f"idle {record['device_idle']:.1%}, {record['launches']:.1f} launches, {record['kernels']:.1f} kernels a step"
    )
    for kernel in record["top"]:
        print(f"  {kernel['ms']:8.4f} ms  {kernel['count']:6.1f} times  {kernel['name'][:100]}")
