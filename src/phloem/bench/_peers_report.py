"""What the rounds of `phloem bench peers` amount to: medians, ratios, a table and a bar chart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phloem.utils import plots

WORKLOAD_NAMES: tuple[str, ...] = ("single", "prefill", "throughput", "shared-prefix", "conversations", "structured")
_OUTPUT, _TTFT, _PREFILL = "output_tok_per_s", "ttft_mean_ms", "prefill_tok_per_s"
LABELS = {
    _OUTPUT: "output tok/s",
    _TTFT: "TTFT mean, ms",
    _PREFILL: "prefill tok/s",
    "requests_per_s": "answers/s",
    "valid_share": "valid answers",
    "ready_s": "ready after, s",
    "peak_gb": "peak memory, GB",
}
_METRICS: dict[str, tuple[str, ...]] = {
    "single": (_OUTPUT, _TTFT),
    "prefill": (_PREFILL, _TTFT),
    "throughput": (_OUTPUT, _TTFT),
    "shared-prefix": (_OUTPUT, _TTFT),
    "conversations": (_OUTPUT, _TTFT),
    "structured": (_OUTPUT, "requests_per_s", _TTFT, "valid_share"),
}
SERVER = "server"  # the rows that are the server's, not a workload's


def _figures(record: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {name: record[name] for name in (_OUTPUT, _PREFILL, "requests_per_s")}
    found[_TTFT] = record["ttft_ms"].get("mean", float("nan"))
    if "valid" in record:
        found["valid_share"] = record["valid"] / record["requests"]
    return found


def summary(records: Sequence[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """A line per workload, metric and peer: the median over the rounds, and the ratio of `first`'s median to it.

    Runs in which a request failed are counted in `failed_runs` and are no part of the median, which is None when
    nothing is left.
    """
    peers = list(dict.fromkeys(record["peer"] for record in records))
    lines: list[dict[str, Any]] = []
    for workload in WORKLOAD_NAMES:
        for metric in _METRICS[workload]:
            rows: list[dict[str, Any]] = []
            for peer in peers:
                runs = [r for r in records if r["workload"] == workload and r["peer"] == peer]
                good = [_figures(run)[metric] for run in runs if not run["failed"]]
                if runs:
                    rows.append(_line(workload, metric, peer, good, len(runs) - len(good)))
            lines += rows
    for metric, key, unit in (("ready_s", "ready_s", 1.0), ("peak_gb", "peak_bytes", 1e-9)):
        for peer in peers:
            rounds = {r["round"]: r[key] * unit for r in records if r["peer"] == peer}
            lines.append(_line(SERVER, metric, peer, list(rounds.values()), 0))
    own = {(line["workload"], line["metric"]): line["median"] for line in lines if line["peer"] == first}
    for line in lines:
        mine, its = own.get((line["workload"], line["metric"])), line["median"]
        line["ratio"] = mine / its if mine is not None and its else None
    return lines


def _line(workload: str, metric: str, peer: str, values: list[float], failed: int) -> dict[str, Any]:
    return {
        "benchmark": "peers",
        "workload": workload,
        "metric": metric,
        "peer": peer,
        "median": statistics.median(values) if values else None,
        "values": values,
        "failed_runs": failed,
    }


def print_summary(lines: Sequence[dict[str, Any]], first: str) -> None:
    """One row per workload and metric, one column per peer: its median, and the ratio of `first` to it."""
    from rich.console import Console
    from rich.table import Table

    peers = list(dict.fromkeys(line["peer"] for line in lines))
    table = Table(title=f"medians; in brackets {first} divided by the peer")
    for head in ("workload", "", *peers):
        table.add_column(head, justify="left" if head in ("workload", "") else "right")
    for workload, metric in dict.fromkeys((line["workload"], line["metric"]) for line in lines):
        cells = {line["peer"]: line for line in lines if (line["workload"], line["metric"]) == (workload, metric)}
        place = WORKLOAD_NAMES.index(workload) + 1 if workload in WORKLOAD_NAMES else 0
        name = f"W{place} {workload}" if place else workload
        table.add_row(name, LABELS[metric], *(_cell(cells.get(peer), first) for peer in peers))
    Console().print(table)


def _cell(line: dict[str, Any] | None, first: str) -> str:
    if line is None:
        return "-"
    value = line["median"]
    text = "failed" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if line["peer"] != first and line["ratio"] is not None:
        text += f" ({line['ratio']:.2f}x)"
    return text


def draw(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A panel per workload and metric with a bar per peer (whiskers: the lowest and the highest round), as a PNG."""
    pyplot = plots.pyplot()

    peers = list(dict.fromkeys(line["peer"] for line in lines))
    keys = list(dict.fromkeys((line["workload"], line["metric"]) for line in lines))
    colours = dict(zip(peers, pyplot.get_cmap("tab10")(range(len(peers))), strict=True))
    columns = 4
    count = -(-len(keys) // columns)
    figure, panels = pyplot.subplots(count, columns, figsize=(4 * columns, 2.8 * count), squeeze=False)
    for panel, (workload, metric) in zip(panels.flat, keys, strict=False):
        shown = [x for x in lines if (x["workload"], x["metric"]) == (workload, metric) and x["median"] is not None]
        for place, line in enumerate(shown):
            spread = [[line["median"] - min(line["values"])], [max(line["values"]) - line["median"]]]
            panel.bar(place, line["median"], yerr=spread, capsize=3, color=colours[line["peer"]])
        better = "higher" if metric in (_OUTPUT, _PREFILL, "requests_per_s", "valid_share") else "lower"
        panel.set_title(f"{workload}: {LABELS[metric]} ({better} is better)", fontsize=9)
        panel.set_xticks(range(len(shown)), [line["peer"] for line in shown], fontsize=7, rotation=12)
    for panel in panels.flat[len(keys) :]:
        panel.set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
