"""Measure the engine in this process, without HTTP: throughput, and where the time of a step goes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import phloem
from phloem.bench._report import context, write_line
from phloem.bench._text import Texts
from phloem.bench._workloads import WORKLOADS, Sizes, Workload
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest

_SINGLE_TURN = ("single", "prefill", "throughput", "shared-prefix")


@dataclass(frozen=True)
class Options:
    workload: str = opt("throughput", f"One of {', '.join(_SINGLE_TURN)}; or several with commas.")
    requests: int | None = opt(None, "Requests (of one group, for shared-prefix).")
    input_len: int | None = opt(None, "Prompt length in tokens.")
    output_len: int | None = opt(None, "Output length in tokens.")
    compare_cache: bool = opt(False, "Run each workload again without the prefix cache, and print what it saves.")
    seed: int = opt(1, "Seed of the prompts.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench offline", argv, Options, skip=("server",), description=__doc__ or "")
    names = options.workload.split(",")
    for name in names:
        if name not in _SINGLE_TURN:
            raise BadRequest(f"unknown workload {name!r}; known here: {', '.join(_SINGLE_TURN)}")
    settings = {**config.flat(), "log_level": "warning"}
    records = _run(options, names, settings)
    if options.compare_cache:
        for cached, plain in zip(records, _run(options, names, {**settings, "disable_radix_cache": True}), strict=True):
            less, computed = plain["computed_tokens"], cached["computed_tokens"]
            print(
                f"{cached['workload']}: hit rate {cached['cache_hit_rate']:.2f} with the prefix cache, "
                f"{less / max(1, computed):.1f}x less prefill ({computed:,} prompt tokens computed, not {less:,}), "
                f"{plain['seconds'] / cached['seconds']:.1f}x faster"
            )
    return 0


def _run(options: Options, names: list[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    begun = perf_counter()
    with phloem.Engine(**settings) as engine:
        ready = perf_counter() - begun
        if engine.tokenizer is None:
            raise BadRequest("the prompts need a tokenizer: leave --skip-tokenizer-init out")
        for name in names:
            texts = Texts(engine.tokenizer, options.seed)
            load = WORKLOADS[name](texts, Sizes(options.requests, None, options.input_len, options.output_len))
            record = {**context(), "model": settings["model_path"], "ready_s": ready, **measure(engine, load)}
            record["prefix_cache"] = not settings["disable_radix_cache"]
            records.append(record)
            _show(record)
            if options.output:
                write_line(Path(options.output), record)
    return records


def measure(engine: Any, load: Workload) -> dict[str, Any]:
    """All prompts of a workload at once (one by one where it says so)."""
    prompts = [session.turns[0].text for session in load.sessions]
    params = {"max_new_tokens": load.sessions[0].turns[0].output_tokens, "temperature": 0.0, "ignore_eos": True}
    engine.flush_cache(timeout=10.0)
    engine.generate(prompts[0][:40], {**params, "max_new_tokens": 2})
    before = engine.get_server_info()["internal_states"][0]
    start = perf_counter()
    if load.concurrency == 1:
        answers = [engine.generate(prompt, params) for prompt in prompts]
    else:
        answers = engine.generate(prompts, params)
    seconds = perf_counter() - start
    after = engine.get_server_info()["internal_states"][0]
    busy = max(after["busy_seconds"] - before["busy_seconds"], 1e-9)
    inputs = sum(answer["meta_info"]["prompt_tokens"] for answer in answers)
    outputs = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
    cached = sum(answer["meta_info"]["cached_tokens"] for answer in answers)
    return {
        "workload": load.name,
        "requests": len(prompts),
        "seconds": seconds,
        "input_tok_per_s": inputs / seconds,
        "output_tok_per_s": outputs / seconds,
        "input_tokens": inputs,
        "computed_tokens": inputs - cached,
        "cache_hit_rate": cached / inputs if inputs else 0.0,
        "steps": after["steps"] - before["steps"],
        "outside_forward": 1.0 - (after["forward_seconds"] - before["forward_seconds"]) / busy,
    }


def _show(record: dict[str, Any]) -> None:
    print(
        f"{record['workload']}: {record['requests']} requests in {record['seconds']:.2f} s, "
        f"{record['input_tok_per_s']:,.0f} input tok/s, {record['output_tok_per_s']:,.0f} output tok/s, "
        f"hit rate {record['cache_hit_rate']:.2f}, {record['steps']} steps, "
        f"{record['outside_forward']:.1%} of step time outside the forward pass"
    )
    print(json.dumps(record))
