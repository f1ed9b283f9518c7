"""Figures of two versions side by side: what is read from the benchmarks' JSON lines, medians, ratios, the table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Sample = dict[str, float]  # metric -> figure, of one round of one side


@dataclass(frozen=True)
class Metric:
    """A figure's name in the table. `workload` is what `--only` calls it by."""

    workload: str
    text: str
    unit: str
    more_is_better: bool


METRICS: dict[str, Metric] = {
    "ready_s": Metric("ready", "server ready after", "s", False),
    "ready_mb": Metric("memory", "resident when ready", "MB", False),
    "after_mb": Metric("memory", "resident after the workloads", "MB", False),
    "w1_decode": Metric("W1", "one stream, decode", "tok/s", True),
    "w2_prefill": Metric("W2", "long prompts, prefill", "tok/s", True),
    "w2_ttft": Metric("W2", "long prompts, mean TTFT", "ms", False),
    "w3_out": Metric("W3", "many in flight, output", "tok/s", True),
    "w3_ttft": Metric("W3", "many in flight, mean TTFT", "ms", False),
    "w4_out": Metric("W4", "shared prefixes, output", "tok/s", True),
    "w4_ttft": Metric("W4", "shared prefixes, mean TTFT", "ms", False),
    "w5_out": Metric("W5", "conversations, output", "tok/s", True),
    "w5_ttft": Metric("W5", "conversations, mean TTFT", "ms", False),
    "w6_out": Metric("W6", "constrained output", "tok/s", True),
    "w6_free": Metric("W6", "the same prompts, free", "tok/s", True),
    "offline_ready_s": Metric("offline", "in process: ready after", "s", False),
    "offline_decode": Metric("offline", "in process: one stream, output", "tok/s", True),
    "offline_prefill": Metric("offline", "in process: long prompts, input", "tok/s", True),
    "offline_out": Metric("offline", "in process: many at once, output", "tok/s", True),
    "offline_outside": Metric("offline", "in process: many, share outside the forward pass", "", False),
    "offline_prefix_out": Metric("offline", "in process: shared prefixes, output", "tok/s", True),
}
WORKLOADS = tuple(dict.fromkeys(metric.workload for metric in METRICS.values()))
SERVED = {"W1": "single", "W2": "prefill", "W3": "throughput", "W4": "shared-prefix", "W5": "conversations"}

_SERVING: dict[str, dict[str, tuple[str, ...]]] = {
    "single": {"w1_decode": ("decode_tok_per_s",)},
    "prefill": {"w2_prefill": ("prefill_tok_per_s",), "w2_ttft": ("ttft_ms", "mean")},
    "throughput": {"w3_out": ("output_tok_per_s",), "w3_ttft": ("ttft_ms", "mean")},
    "shared-prefix": {"w4_out": ("output_tok_per_s",), "w4_ttft": ("ttft_ms", "mean")},
    "conversations": {"w5_out": ("output_tok_per_s",), "w5_ttft": ("ttft_ms", "mean")},
}
_STRUCTURED: dict[str, tuple[str, ...]] = {
    "w6_out": ("sides", "constrained", "output_tok_per_s"),
    "w6_free": ("sides", "free", "output_tok_per_s"),
}
_OFFLINE: dict[str, dict[str, tuple[str, ...]]] = {
    "single": {"offline_decode": ("output_tok_per_s",), "offline_ready_s": ("ready_s",)},
    "prefill": {"offline_prefill": ("input_tok_per_s",)},
    "throughput": {"offline_out": ("output_tok_per_s",), "offline_outside": ("outside_forward",)},
    "shared-prefix": {"offline_prefix_out": ("output_tok_per_s",)},
}


def figures(benchmark: str, records: Iterable[dict[str, Any]]) -> Sample:
    """What is compared, of the JSON lines that a benchmark (`serving`, `structured`, `offline`) wrote.

    Raises:
        ValueError: a request failed.
    """
    found: Sample = {}
    for record in records:
        if record.get("failed"):
            raise ValueError(f"{record['workload']}: {record['failed']} requests failed: {record.get('errors')}")
        if benchmark == "structured":
            wanted = _STRUCTURED if record["what"] == "cost" else {}
        else:
            wanted = (_SERVING if benchmark == "serving" else _OFFLINE).get(record["workload"], {})
        for name, path in wanted.items():
            value: Any = record
            for key in path:
                value = value[key]
            found[name] = float(value)
    return found


@dataclass(frozen=True)
class Row:
    """One metric: medians of both sides, their ratio B/A, and the least and the largest ratio of one round."""

    metric: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> str:
        """`B better` or `B worse` where every round says so, else `no difference seen`; of one round none."""
        if self.rounds < 2 or self.low <= 1.0 <= self.high:
            return "no difference seen" if self.rounds > 1 else ""
        return "B better" if (self.ratio > 1.0) == METRICS[self.metric].more_is_better else "B worse"


def rows(a: Sequence[Sample], b: Sequence[Sample]) -> list[Row]:
    """A row for each metric that both sides have in some round; round i of `a` belongs to round i of `b`."""
    found: list[Row] = []
    for name in METRICS:
        pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) if name in x and name in y]
        if not pairs:
            continue
        first, second = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        ratios = [ratio(x, y) for x, y in pairs]
        found.append(Row(name, first, second, ratio(first, second), min(ratios), max(ratios), len(pairs)))
    return found


def ratio(a: float, b: float) -> float:
    """B/A; 1 for two zeros, infinite where only A is none."""
    if a == 0.0:
        return 1.0 if b == 0.0 else float("inf")
    return b / a


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(found: Sequence[Row], title: str) -> str:
    """The rows as aligned text."""
    head = ("", "", "A", "B", "B/A", "of single rounds", "")
    lines: list[tuple[str, ...]] = [head]
    for row in found:
        metric = METRICS[row.metric]
        spread = f"{row.low:.3f}-{row.high:.3f}" if row.rounds > 1 else ""
        text = f"{metric.text}, {metric.unit}" if metric.unit else metric.text
        lines.append((metric.workload, text, number(row.a), number(row.b), f"{row.ratio:.3f}", spread, row.verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    left = {0, 1, 6}
    return "\n".join(
        [title]
        + [
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
    )
