"""Perplexity of English prose under the served weights, next to the same weights in the plain torch ops.

The text is the language reference that ships with Python. It is cut into windows; the perplexity is e to the mean
negative log-probability of every token but each window's first. Every model of --models is measured under every KV type
of --kv-types, and once in the plain ops. A model that scales its embedding (Gemma) rounds the scale to its own type:
serve it with `--dtype float32` to see the kernels alone.

With --methods every model is also measured under each of those, and with --dense other forms of one model (what
`phloem quantize` wrote, say). Differences then are those from the weights as they are, or from that model, in float32:
they tell what the form of the weights costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import phloem
from phloem.bench._report import context, write_line
from phloem.bench._text import sentences
from phloem.checkpoint.describe import describe
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest

AT_ONCE = 4  # windows that are scored by one call: how often the progress moves


@dataclass(frozen=True)
class Options:
    models: tuple[str, ...] = opt((), "Models to measure (default: the one of --model).")
    kv_types: tuple[str, ...] = opt((), "KV types to measure each under (default: the one of --kv-cache-dtype).")
    methods: tuple[str, ...] = opt((), "Quantisation methods to measure each under; 'none': the weights as they are.")
    dense: str | None = opt(None, "The model that all others are forms of: what they are compared with.")
    tokens: int = opt(20_000, "Length of the text in tokens.")
    window: int = opt(512, "Tokens that are scored together; each sees those before it in its window.")
    against: str = opt("reference", "Op table to compare with, in float32; 'none' measures the served one alone.")
    limit: float | None = opt(None, "Exit with status 1 beyond so many percent (default: 1; of forms of weights: any).")
    output: str | None = opt(None, "File to append JSON lines to, one for each model, method and KV type.")


def main(argv: list[str]) -> int:
    config, options = parse("bench accuracy", argv, Options, skip=("server",), description=__doc__ or "")
    if options.window < 2 or options.tokens < options.window:
        raise BadRequest("--window must be at least 2, and --tokens at least --window")
    settings = {name: value for name, value in config.flat().items() if value is not None} | {"log_level": "warning"}
    models = options.models or (config.model.model_path,)
    stored = {model: weight_types(model, config.model.load_format) for model in models}  # all of them can be read
    dense = {**settings, "model_path": options.dense, "quantization": None} if options.dense else None
    against = None if dense is None else plain_run(dense, options)
    records: list[dict[str, Any]] = []
    for model in models:
        about = {**context(), "model": Path(model).name, "weights": stored[model]}
        for record in compare({**settings, "model_path": model}, options, against):
            records.append({**about, **record})
            if options.output:
                write_line(Path(options.output), records[-1])
    print_table(records)
    limit = options.limit if options.limit is not None or options.methods or options.dense else 1.0
    found = [abs(record.get("difference_percent", 0.0)) for record in records]
    return int(limit is not None and any(value > limit for value in found))


def plain_run(settings: dict[str, Any], options: Options) -> dict[str, Any] | None:
    """One run in the plain ops, in float32; None where nothing is compared."""
    if options.against == "none":
        return None
    # The KV cache too: a float32 model has a float32 cache.
    other = {**settings, "ops": options.against, "dtype": "float32", "kv_cache_dtype": "float32"}
    return perplexity(other, options, f"{Path(settings['model_path']).name}, {options.against}")


def compare(settings: dict[str, Any], options: Options, plain: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """One model: a record for each method and KV type, all of them with one run in the plain ops: `plain`, or of this
    model."""
    name = Path(settings["model_path"]).name
    kinds = options.kv_types or (settings.get("kv_cache_dtype", "auto"),)
    asked = settings.get("quantization")
    methods = [None if method == "none" else method for method in options.methods] or [asked]
    if plain is None:
        plain = plain_run({**settings, "quantization": None if options.methods else asked}, options)
    found: list[dict[str, Any]] = []
    for method, kind in product(methods, kinds):
        about = f"{name}, {method or 'as it is'}, KV {kind}"
        served = perplexity({**settings, "quantization": method, "kv_cache_dtype": kind}, options, about)
        record: dict[str, Any] = {
            "quantization": method,
            "kv_cache_dtype": served["kv_cache_dtype"],
            "window": options.window,
            "served": served,
        }
        if plain is not None:
            record["plain"] = plain
            record["difference_percent"] = 100.0 * (served["perplexity"] / plain["perplexity"] - 1.0)
        found.append(record)
    return found


def perplexity(settings: dict[str, Any], options: Options, name: str = "") -> dict[str, Any]:
    """Score the text with an engine of these settings; says what it found."""
    with phloem.Engine(**settings) as engine:
        if engine.tokenizer is None:
            raise BadRequest("the text needs a tokenizer: leave --skip-tokenizer-init out")
        windows = cut(engine.tokenizer.encode(" ".join(sentences())), options.tokens, options.window)
        start = perf_counter()
        found = _score(engine, windows, name)
        seconds = perf_counter() - start
        told = engine.get_server_info()
    result: dict[str, Any] = {
        "perplexity": math.exp(-sum(found) / len(found)),
        "tokens": len(found),
        "seconds": seconds,
    }
    result["kv_cache_dtype"] = told["kv_cache_dtype"]  # what 'auto' has become
    result["weight_bytes"] = told["weight_bytes"]
    print(f"{name}: perplexity {result['perplexity']:.4f} over {result['tokens']} tokens ({seconds:.1f} s)")
    return result


def _score(engine: Any, windows: list[list[int]], name: str) -> list[float]:
    """Log-probabilities of all tokens but each window's first, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    found: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(name, total=len(windows))
        for at in range(0, len(windows), AT_ONCE):
            answers: Any = engine.generate(
                input_ids=windows[at : at + AT_ONCE],
                sampling_params={"max_new_tokens": 1, "temperature": 0.0},
                return_logprob=True,
                logprob_start_len=0,
            )
            for answer in answers:
                scored = answer["meta_info"]["input_token_logprobs"]
                found += [value for value, *_ in scored if value is not None]
            bar.advance(task, len(answers))
    return found


def cut(ids: list[int], tokens: int, window: int) -> list[list[int]]:
    """Whole windows of the first `tokens` ids."""
    ids = ids[:tokens]
    return [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)]


def weight_types(model: str, load_format: str = "auto") -> dict[str, int]:
    """Bytes of a GGUF file's matrices by the type they are stored in, the most first; empty for other checkpoints.

    A file's name tells its usual type alone: tensors whose rows are no whole blocks of it have another.

    Raises:
        ModelLoadError: if there is no such model.
    """
    file = describe(model, load_format).gguf
    found: dict[str, int] = {}
    for tensor in file.tensors.values() if file is not None else ():
        if len(tensor.shape) > 1:
            found[tensor.kind] = found.get(tensor.kind, 0) + tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def print_table(records: Sequence[dict[str, Any]]) -> None:
    """A row for each model, method and KV type."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="perplexity")
    for place, head in enumerate(
        ("model", "in the file, MB", "KV", "in memory, MB", "served", "float32", "difference, %")
    ):
        table.add_column(head, justify="left" if place < 3 else "right", overflow="fold")
    for record in records:
        weights = ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in record["weights"].items())
        plain, worse = record.get("plain"), record.get("difference_percent")
        table.add_row(
            record["model"] + (f", {record['quantization']}" if record["quantization"] else ""),
            weights,
            record["kv_cache_dtype"],
            f"{record['served'].get('weight_bytes', 0) / 1e6:.0f}",
            f"{record['served']['perplexity']:.4f}",
            "-" if plain is None else f"{plain['perplexity']:.4f}",
            "-" if worse is None else f"{worse:+.3f}",
        )
    Console().print(table)
