"""One result format: a JSON line per run; drawn as a table and as a plot."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phloem.bench._client import Result
from phloem.utils import machine, plots
from phloem.utils.cores import available_cores


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between closest ranks; NaN for nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(name: str, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Figures of one run; latencies in milliseconds."""
    good = [item for item in results if not item.error]
    inputs, outputs = sum(r.input_tokens for r in good), sum(r.output_tokens for r in good)
    ttft = [r.ttft * 1e3 for r in good]
    tpot = [r.tpot * 1e3 for r in good if r.tpot is not None]
    gaps = [gap * 1e3 for r in good for gap in r.gaps]
    return {
        "workload": name,
        "requests": len(results),
        "failed": len(results) - len(good),
        "errors": sorted({r.error for r in results if r.error})[:5],
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "input_tok_per_s": inputs / seconds,
        "output_tok_per_s": outputs / seconds,
        "input_tokens": inputs,
        "output_tokens": outputs,
        "cached_tokens": sum(r.cached_tokens for r in good),
        "cache_hit_rate": sum(r.cached_tokens for r in good) / inputs if inputs else 0.0,
        "prefill_tok_per_s": statistics.median(r.input_tokens / r.ttft for r in good) if good else 0.0,
        "decode_tok_per_s": 1e3 / median if tpot and (median := statistics.median(tpot)) else 0.0,
        "ttft_ms": _spread(ttft),
        "tpot_ms": _spread(tpot),
        "itl_ms": _spread(gaps),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "mean": statistics.fmean(values),
        "p50": percentile(values, 0.5),
        "p90": percentile(values, 0.9),
        "p99": percentile(values, 0.99),
    }


def context() -> dict[str, Any]:
    """Where and when a result was taken."""
    from importlib.metadata import version

    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "phloem": version("phloem"),
        "python": platform.python_version(),
        "processor": machine.cpu_name(),
        "cores": available_cores(),
    }


def write_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


_ROWS: tuple[tuple[str, str], ...] = (
    ("requests/s", "requests_per_s"),
    ("input tok/s", "input_tok_per_s"),
    ("output tok/s", "output_tok_per_s"),
    ("cache hit rate", "cache_hit_rate"),
    ("failed", "failed"),
)


def print_table(records: Sequence[dict[str, Any]], title: str) -> None:
    """One column per run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    for record in records:
        table.add_column(record.get("label") or record["workload"], justify="right")
    for label, key in _ROWS:
        table.add_row(label, *(_number(record[key]) for record in records))
    for label, key in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms")):
        for part in ("mean", "p50", "p99"):
            table.add_row(f"{label} {part}, ms", *(_number(record[key].get(part)) for record in records))
    Console().print(table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plot(results: Sequence[Result], record: dict[str, Any], path: Path) -> None:
    """Requests over time, and how TTFT and ITL are distributed, as a PNG."""
    pyplot = plots.pyplot()

    good = [item for item in results if not item.error]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    begin = min((r.start for r in results), default=0.0)
    for i, item in enumerate(sorted(good, key=lambda r: r.start)):
        left.barh(i, item.ttft, left=item.start - begin, color="#d9822b")
        left.barh(i, item.end - item.first, left=item.first - begin, color="#2b6cb0")
    left.set(title="requests: waiting and prefill, then decode", xlabel="seconds", ylabel="request")
    middle.hist([r.ttft * 1e3 for r in good], bins=30, color="#d9822b")
    middle.set(title="time to first token", xlabel="ms", ylabel="requests")
    gaps = [gap * 1e3 for r in good for gap in r.gaps]
    right.hist(gaps, bins=60, color="#2b6cb0", log=bool(gaps))
    right.set(title="gaps between tokens", xlabel="ms", ylabel="gaps")
    figure.suptitle(
        f"{record.get('label') or record['workload']}: {record['output_tok_per_s']:.0f} output tok/s, "
        f"{record['requests_per_s']:.2f} requests/s, hit rate {record['cache_hit_rate']:.2f}"
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
