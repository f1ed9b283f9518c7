"""What this engine is to reach on a card beside others, and what it reached: from what gpu_peers.py found.

Peers of the same run are compared with; where there are none, what was measured on such a card in an earlier run, which
the page says in every line: another day, another process, perhaps another clock of the card.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EARLIER = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "gpu-peers-20261127.json"
MINE = "phloem"


@dataclass(frozen=True)
class Goal:
    """Ours over the best peer's: `bound` at least, or with `most` at most. `load` "": a figure of the whole start."""

    name: str
    load: str
    figure: str
    bound: float
    most: bool = False


GOALS = (
    Goal("one stream, decode tok/s", "one", "decode_tok_per_s", 1.05),
    Goal("32 in flight, tok/s", "32", "output_tok_per_s", 1.15),
    Goal("128 in flight, tok/s", "128", "output_tok_per_s", 1.05),
    Goal("shared prefix, tok/s", "shared", "output_tok_per_s", 1.5),
    Goal("32 in flight, mean TTFT", "32", "ttft_ms_mean", 0.5, most=True),
    Goal("128 in flight, mean TTFT", "128", "ttft_ms_mean", 0.5, most=True),
    Goal("32 in flight, ITL p99", "32", "itl_ms_p99", 1.0, most=True),
    Goal("128 in flight, ITL p99", "128", "itl_ms_p99", 1.0, most=True),
    Goal("ready", "", "ready_s", 0.25, most=True),
)
COLD = 0.9  # the first round of a workload, over its second


def earlier(card: str) -> dict[str, Any]:
    """What was measured on such a card: {"from": words, "engines": {name: figures}}; empty if nothing was."""
    told = json.loads(EARLIER.read_text())
    engines = told["cards"].get(card)
    if engines is None:
        return {}
    return {"from": f"another run, {told['date']} at {told['commit']}, {told['versions']}", "engines": engines}


def _figures(one: dict[str, Any]) -> dict[str, Any]:
    """Of a run's engine in the form of an earlier one's: the second round of each workload."""
    return {"ready_s": one["ready_s"], **{name: rows[-1] for name, rows in one["rounds"].items() if len(rows) > 1}}


def _of(figures: dict[str, Any], goal: Goal) -> float | None:
    return (figures.get(goal.load, {}) if goal.load else figures).get(goal.figure)


def reached(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each goal: "ours", "theirs", "who", "ratio", "bound" and "verdict" ("reached", "missed", or "open" with
    the reason); "run" is "this" or words on the earlier one."""
    if MINE not in found["engines"]:
        return []
    mine = _figures(found["engines"][MINE])
    peers = {name: _figures(one) for name, one in found["engines"].items() if not name.startswith(MINE)}
    before = found.get("earlier") or {}
    where = "this" if peers or not before else str(before["from"])
    if not peers:
        peers = {name: one for name, one in before.get("engines", {}).items() if not name.startswith(MINE)}
    rows = [_row(goal, mine, peers, where) for goal in GOALS]
    for load, rounds in found["engines"][MINE]["rounds"].items():
        if len(rounds) > 1:
            first, last = (max(1e-9, float(one["output_tok_per_s"])) for one in (rounds[0], rounds[-1]))
            row = {"goal": f"{load}: cold tok/s over warm", "ours": first, "theirs": last, "who": MINE, "run": "this"}
            rows.append(row | {"ratio": first / last, "bound": COLD, "verdict": _verdict(first / last, COLD, False)})
    return rows


def _row(goal: Goal, mine: dict[str, Any], peers: dict[str, Any], where: str) -> dict[str, Any]:
    bound = {"goal": goal.name, "bound": goal.bound, "most": goal.most, "run": where}
    ours = _of(mine, goal)
    theirs = {name: value for name, one in peers.items() if (value := _of(one, goal)) is not None}
    if ours is None or not theirs:
        return {
            **bound,
            "ours": ours,
            "verdict": f"open: {'not measured' if ours is None else 'no peer to compare with'}",
        }
    who = (min if goal.most else max)(theirs, key=lambda name: theirs[name])
    ratio = ours / theirs[who] if theirs[who] else (math.inf if ours else 1.0)
    verdict = _verdict(ratio, goal.bound, goal.most)
    return {**bound, "ours": ours, "theirs": theirs[who], "who": who, "ratio": ratio, "verdict": verdict}


def _verdict(ratio: float, bound: float, most: bool) -> str:
    return "reached" if (ratio <= bound if most else ratio >= bound) else "missed"


def page(found: dict[str, Any]) -> list[str]:
    """Lines of a page."""
    rows = reached(found)
    if not rows:
        return []
    lines = ["| goal | this engine | best peer | ratio | wanted | |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for row in rows:
        ours = "" if row["ours"] is None else f"{row['ours']:.1f}"
        theirs = f"{row['theirs']:.1f} ({row['who']})" if "theirs" in row else ""
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        other = "" if row["run"] == "this" or "ratio" not in row else ", against another run"
        wanted = f"{'at most' if row.get('most') else 'at least'} {row['bound']}"
        lines.append(f"| {row['goal']} | {ours} | {theirs} | {ratio} | {wanted} | {row['verdict']}{other} |")
    if before := found.get("earlier"):
        lines += ["", f"No other engine is installed here: its figures are of {before['from']}."]
    return lines
