"""The pure parts of scripts/compare_commits.py: arguments, whose library may be lent, figures, medians, ratios."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import compare_commits
import compare_report
import pytest


def checkout(folder: Path, text: str = "int one;", library: bool = False) -> Path:
    (folder / "csrc" / "cpu").mkdir(parents=True)
    (folder / "src" / "phloem" / "kernels").mkdir(parents=True)
    (folder / "setup.py").write_text("")
    (folder / "csrc" / "cpu" / "a.cpp").write_text(text)
    if library:
        (folder / "src" / "phloem" / "kernels" / "_cpu.abi3.so").write_text("built")
    return folder


def test_arguments_have_defaults_and_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    options = compare_commits.parse(["v1", "WORKTREE"])
    assert (options.a, options.b, options.rounds) == ("v1", "WORKTREE", 3)
    assert options.only == ["ready", "memory", "W1", "W2", "W3", "W4", "W5", "W6", "offline"]
    assert compare_commits.parse(["a", "b", "--quick"]).rounds == 1
    assert compare_commits.parse(["a", "b", "--quick", "--rounds", "2", "--only", "W1,W6"]).only == ["W1", "W6"]
    for wrong in (["a"], ["a", "b", "--only", "W9"], ["a", "b", "--rounds", "0"], ["a", "b", "--only", ""]):
        with pytest.raises(SystemExit):
            compare_commits.parse(wrong)
    assert "unknown 'W9'" in capsys.readouterr().err


def test_a_side_is_a_commit_a_folder_or_the_worktree(tmp_path: Path) -> None:
    assert compare_commits.kind_of("WORKTREE") == "worktree"
    assert compare_commits.kind_of(str(checkout(tmp_path / "a"))) == "folder"
    assert compare_commits.kind_of("HEAD~3") == "commit"


def test_who_comes_first_changes_from_round_to_round(tmp_path: Path) -> None:
    a, b = (compare_commits.Side(name, name, tmp_path) for name in "AB")
    assert [one.name for number in range(3) for one in compare_commits.order([a, b], number)] == list("ABBAAB")


def test_a_library_is_lent_only_where_the_sources_are_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    same = checkout(tmp_path / "same", library=True)
    changed = checkout(tmp_path / "changed", "int two;", library=True)
    stale = checkout(tmp_path / "stale", library=True)
    os.utime(compare_commits.library_of(stale) or "", (1, 1))
    wanting = checkout(tmp_path / "wanting")
    assert compare_commits.digest(wanting) == compare_commits.digest(same) != compare_commits.digest(changed)
    assert not compare_commits.up_to_date(stale) and not compare_commits.up_to_date(wanting)
    side = compare_commits.Side("A", "HEAD", wanting)
    monkeypatch.setattr(compare_commits.sys, "executable", "false")  # compiling fails
    with pytest.raises(SystemExit, match="not built"):
        compare_commits.provide_library(side, [changed, stale])
    compare_commits.provide_library(side, [changed, stale, same])
    assert compare_commits.library_of(wanting) and side.library.startswith("copied")
    folder = compare_commits.Side("B", str(checkout(tmp_path / "bare")), tmp_path / "bare")
    with pytest.raises(SystemExit, match="lacks the native library"):
        compare_commits.provide_library(folder, [same])


def test_figures_come_from_the_lines_of_each_benchmark() -> None:
    served = [
        {"workload": "single", "failed": 0, "decode_tok_per_s": 200.0},
        {"workload": "prefill", "failed": 0, "prefill_tok_per_s": 3000, "ttft_ms": {"mean": 600.0}},
    ]
    found = compare_report.figures("serving", served)
    assert found == {"w1_decode": 200.0, "w2_prefill": 3000.0, "w2_ttft": 600.0}
    sides = {"free": {"output_tok_per_s": 10.0}, "constrained": {"output_tok_per_s": 9.0}}
    lines = [{"what": "cost", "sides": sides}, {"what": "jump-forward", "sides": {}}]
    assert compare_report.figures("structured", lines) == {"w6_out": 9.0, "w6_free": 10.0}
    offline = {"workload": "throughput", "output_tok_per_s": 500.0, "outside_forward": 0.1}
    assert compare_report.figures("offline", [offline]) == {"offline_out": 500.0, "offline_outside": 0.1}
    with pytest.raises(ValueError, match="2 requests failed"):
        compare_report.figures("serving", [{"workload": "single", "failed": 2, "errors": ["no"]}])


def test_rows_have_medians_and_ratios_and_say_what_every_round_says() -> None:
    a = [{"w1_decode": 100.0, "w2_ttft": 10.0}, {"w1_decode": 110.0, "w2_ttft": 12.0}, {"w1_decode": 90.0}]
    b = [{"w1_decode": 120.0, "w2_ttft": 11.0}, {"w1_decode": 121.0, "w2_ttft": 13.0}, {"w1_decode": 88.0}]
    decode, ttft = compare_report.rows(a, b)
    assert (decode.a, decode.b, decode.rounds) == (100.0, 120.0, 3)
    assert decode.ratio == pytest.approx(1.2)
    assert (decode.low, decode.high) == (pytest.approx(88 / 90), pytest.approx(1.2))
    assert decode.verdict == "no difference seen"  # one round says the opposite
    assert ttft.rounds == 2 and ttft.ratio == pytest.approx(12 / 11) and ttft.verdict == "B worse"
    assert compare_report.rows(a[:1], b[:1])[0].verdict == ""
    (better,) = compare_report.rows([{"ready_s": 2.0}] * 2, [{"ready_s": 1.0}] * 2)
    assert better.verdict == "B better"
    assert compare_report.ratio(0.0, 0.0) == 1.0 and compare_report.ratio(0.0, 1.0) == float("inf")


def test_the_table_is_aligned_and_names_units() -> None:
    found = compare_report.rows([{"w1_decode": 100.0}] * 2, [{"w1_decode": 120.0}] * 2)
    title, head, line = compare_report.table(found, "A = x, B = y").splitlines()
    assert title == "A = x, B = y" and head.split() == ["A", "B", "B/A", "of", "single", "rounds"]
    assert line.split() == [
        "W1",
        "one",
        "stream,",
        "decode,",
        "tok/s",
        "100",
        "120",
        "1.200",
        "1.200-1.200",
        "B",
        "better",
    ]
