"""Recordings of scripts/golden_tokens.py: how they are kept, compared and written. Imports nothing of phloem."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Results = dict[str, Any]  # case -> what was said
SAME_BITS = {"avxvnni": "avx2"}  # levels whose results are those of another, which serves where they were not recorded
TOLERANCE = 0.002  # of log probabilities and hidden states, which are rounded to 3 decimals


def level() -> str:
    """The instruction set that native kernels run: the one asked for (PHLOEM_CPU_LEVEL), else the processor's best."""
    asked = os.environ.get("PHLOEM_CPU_LEVEL", "auto")
    if asked != "auto":
        return asked
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.split(":", 1)[1].split())
                break
    except OSError:
        return "unknown"
    wide = {f"avx512{part}" for part in ("f", "bw", "dq", "vl", "cd", "_vnni", "_bf16")} | {"avx512vbmi"}
    if wide <= flags:
        return "amx" if {"amx_tile", "amx_int8", "amx_bf16"} <= flags else "avx512"
    if {"avx2", "fma", "f16c", "bmi2"} <= flags:
        return "avxvnni" if "avx_vnni" in flags else "avx2"
    return "portable"


def merged(modes: dict[str, Results]) -> Results:
    """Cases as they are kept: those of the first mode, and those of another as `CASE @ MODE` where they differ."""
    first, *others = modes
    kept = dict(modes[first])
    for mode in others:
        kept |= {f"{case} @ {mode}": value for case, value in modes[mode].items() if differences(kept.get(case), value)}
    return dict(sorted(kept.items()))


def differences(want: Any, got: Any, where: str = "") -> list[str]:
    """Where two results differ, one line each: numbers with a fraction by more than TOLERANCE, all else at all."""
    if isinstance(want, dict) and isinstance(got, dict):
        found = [f"{where}.{key}: only in one of them" for key in sorted(want.keys() ^ got.keys())]
        for key in want:
            if key in got:
                found += differences(want[key], got[key], f"{where}.{key}")
        return found
    if isinstance(want, list) and isinstance(got, list):
        return _list_differences(want, got, where)
    if isinstance(want, int | float) and isinstance(got, int | float) and float in (type(want), type(got)):
        return [] if abs(want - got) <= TOLERANCE else [f"{where}: {want} became {got}"]
    return [] if want == got else [f"{where}: {_short(want)} became {_short(got)}"]


def _list_differences(want: list[Any], got: list[Any], where: str) -> list[str]:
    length = [] if len(want) == len(got) else [f"{where}: {len(want)} entries became {len(got)}"]
    pairs = list(enumerate(zip(want, got, strict=False)))
    if any(isinstance(value, dict | list) for value in want):
        return [line for at, (a, b) in pairs for line in differences(a, b, f"{where}[{at}]")] + length
    at = next((at for at, (a, b) in pairs if differences(a, b)), None)
    return length if at is None else [f"{where}[{at}]: {_short(want[at:])} became {_short(got[at:])}"]


def _short(value: Any, most: int = 70) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}..."


def compare(golden: Results, modes: dict[str, Results]) -> tuple[list[str], int]:
    """(differences, cases compared). A case that is not in `golden` counts as a difference."""
    found: list[str] = []
    count = 0
    for mode, cases in modes.items():
        for case, got in cases.items():
            name = f"{case} @ {mode}"
            want = golden.get(name, golden.get(case))
            if want is None:
                found.append(f"{name}: not in the recording")
                continue
            count += 1
            found += [f"{name}: {line}" for line in differences(want, got)]
    return found, count


def compare_all(recording: dict[str, Any], got: dict[str, dict[str, Results]]) -> tuple[list[str], int, list[str]]:
    """(differences, cases compared, remarks): portable cases, and native ones where the level was recorded."""
    found, count = compare(recording["portable"], got["reference"])
    remarks: list[str] = []
    natives = sum(len(cases) for cases in got["native"].values())
    levels, own = recording["levels"], level()
    known = levels.get(own, levels.get(SAME_BITS.get(own, own)))
    if natives and known is None:
        remarks.append(f"no native cases were recorded for {own}: {natives} results were not compared")
    elif natives:
        more, others = compare(known, got["native"])
        found, count = found + more, count + others
    return found, count, remarks


def written(recording: dict[str, Any]) -> str:
    """JSON with a line for each case, so that a change is read easily."""

    def block(cases: Results, indent: str) -> str:
        lines = ",\n".join(f"{indent}  {json.dumps(name)}: {json.dumps(value)}" for name, value in cases.items())
        return f"{{\n{lines}\n{indent}}}"

    levels = ",\n".join(
        f"    {json.dumps(name)}: {block(cases, '    ')}" for name, cases in recording["levels"].items()
    )
    parts = [
        f'  "about": {json.dumps(recording["about"])}',
        f'  "portable": {block(recording["portable"], "  ")}',
        f'  "levels": {{\n{levels}\n  }}',
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def record(path: Path, got: dict[str, dict[str, Results]]) -> None:
    """Write a recording. What a file there has of other cases and other levels stays."""
    from importlib.metadata import version

    old = json.loads(path.read_text()) if path.exists() else {"portable": {}, "levels": {}}
    about = {name: version(name) for name in ("torch", "transformers", "tokenizers", "llguidance")}
    portable = _renewed(old["portable"], got["reference"])
    native = _renewed(old["levels"].get(level(), {}), got["native"])
    levels = {**old["levels"], level(): native} if native else old["levels"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written({"about": about, "portable": portable, "levels": levels}))


def _renewed(old: Results, modes: dict[str, Results]) -> Results:
    new = merged(modes)
    asked = {case for cases in modes.values() for case in cases}
    kept = {name: value for name, value in old.items() if name.split(" @ ")[0] not in asked}
    return dict(sorted({**kept, **new}.items()))
