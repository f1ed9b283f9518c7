"""Servers beside each other under one client: with stand-ins for other engines, which count, break and end as told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gpu_goals
import gpu_peers
import pytest

STAND_INS = Path(__file__).parents[1] / "support" / "peer_stand_ins"
CONFIG = {"vocab_size": 300, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LOADS = [gpu_peers.Load("32", 4, 2, 12, 8), gpu_peers.Load("128", 6, 3, 12, 8)]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """vllm and sglang can be imported here, and by processes."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    paths = [str(STAND_INS), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setattr(gpu_peers, "SETTLE", 0.0)
    return monkeypatch


def compared(seconds: float = 40.0, gib: float = 141.0) -> tuple[dict[str, Any], list[list[str]]]:
    """Both, and whose rounds there were after each."""
    order: list[list[str]] = []

    def tell(found: dict[str, Any]) -> None:
        order.append([name for name, one in found["engines"].items() for rows in one["rounds"].values() for _ in rows])

    return gpu_peers.compare(CONFIG, ("vllm", "sglang"), LOADS, seconds, "", (gib, gib), tell), order


def test_engines_take_turns_and_every_token_is_counted(stand_ins: pytest.MonkeyPatch) -> None:
    found, order = compared()
    assert found["interleaved"] and not found["skipped"] and list(found["engines"]) == ["vllm", "sglang"]
    for one in found["engines"].values():
        assert one["ready_s"] > 0
        for load in LOADS:
            rows = one["rounds"][load.name]
            assert [row["tokens"] for row in rows] == [load.requests * 8] * 2
            assert all(row["unseen"] == 0 and row["output_tok_per_s"] > 0 for row in rows)
            # Eight tokens in events of three: two thirds of the gaps are within an event.
            assert all(row["itl_ms_p50"] == 0 and row["itl_ms_p99"] >= 0 for row in rows)
    sizes = [(names.count("vllm"), names.count("sglang")) for names in order]
    assert sizes[2:] == [(1, 0), (1, 1), (1, 2), (2, 2), (3, 2), (3, 3), (3, 4), (4, 4)]
    assert "The engines ran by turns." in "\n".join(gpu_peers.table(found))


def test_on_a_small_card_they_run_one_after_another(stand_ins: pytest.MonkeyPatch) -> None:
    found, order = compared(gib=48.0)
    assert not found["interleaved"] and not found["skipped"]
    assert [(names.count("vllm"), names.count("sglang")) for names in order][:6] == [
        *((count, 0) for count in range(5)),
        (4, 0),
    ]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("refuse", "did not start: vllm finds no device"),
        ("die", "32, round 1: the server ended (-9)"),
        ("error", "32, round 1: RuntimeError: in the middle of an answer"),
    ],
)
def test_an_engine_that_breaks_is_told_and_the_other_goes_on(
    fault: str, why: str, stand_ins: pytest.MonkeyPatch
) -> None:
    stand_ins.setenv("PEER_FAULT", f"vllm:{fault}")
    found, _ = compared()
    assert why in found["skipped"]["vllm"] and len(found["engines"]["sglang"]["rounds"]["128"]) == 2
    assert "vllm: skipped" in "\n".join(gpu_peers.table(found))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", "stop"])
def test_an_engine_that_hangs_ends_with_the_time(fault: str, stand_ins: pytest.MonkeyPatch) -> None:
    stand_ins.setenv("PEER_FAULT", f"sglang:{fault}")
    stand_ins.setattr(gpu_peers, "ENDING", 0.5)
    found, _ = compared(seconds=6.0)
    assert "no answer until the time was over" in found["skipped"]["sglang"]
    assert len(found["engines"]["vllm"]["rounds"]["32"]) >= 1


def test_what_is_not_installed_is_told() -> None:
    found = gpu_peers.compare(CONFIG, ("vllm",), LOADS, 20.0)
    assert found["skipped"] == {"vllm": "vllm is not installed"} and not found["engines"]


def test_gaps_are_between_tokens_and_counts_are_the_servers() -> None:
    answers = [gpu_peers.Answered(0.0, [1.0, 1.0, 3.0], 3), gpu_peers.Answered(0.5, [1.0, 2.0], 4)]
    found = gpu_peers.figures(answers, 2.0)
    assert found["output_tok_per_s"] == 3.5 and found["tokens"] == 7 and found["unseen"] == 2
    assert found["decode_tok_per_s"] == pytest.approx(2 / 3) and found["ttft_ms_mean"] == 750
    assert found["itl_ms_p50"] == 1000 and found["itl_ms_p99"] == 2000


def test_shares_of_memory_and_room_for_tokens_are_given_where_engines_run_at_once(
    stand_ins: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = {name: gpu_peers.command(name, tmp_path, 1, "", 0.27) for name in ("phloem", "vllm", "sglang")}
    assert lines["vllm"][-2:] == ["--gpu-memory-utilization", "0.270"]
    assert lines["phloem"][-2:] == lines["sglang"][-2:] == ["--max-total-tokens", str(gpu_peers.TOKENS)]
    assert "--max-total-tokens" not in gpu_peers.command("phloem", tmp_path, 1, "")
    loads = gpu_peers.LOADS.values()
    assert (
        max(load.flight * (load.prompt + load.output) + load.groups * load.prefix for load in loads) < gpu_peers.TOKENS
    )


# --- goals


def run_of(**engines: dict[str, float]) -> dict[str, Any]:
    """A run in which each engine's figures are this many times some base; "cold" is the first round over the second."""
    base = {"output_tok_per_s": 100.0, "decode_tok_per_s": 100.0, "ttft_ms_mean": 100.0, "itl_ms_p99": 100.0}
    found: dict[str, Any] = {"engines": {}, "skipped": {}, "interleaved": True}
    for name, factors in engines.items():
        row = {figure: value * factors.get(figure, 1.0) for figure, value in base.items()}
        first = {**row, "output_tok_per_s": row["output_tok_per_s"] * factors.get("cold", 1.0)}
        rounds = {load: [first, row] for load in gpu_peers.LOADS}
        found["engines"][name] = {"ready_s": 100.0 * factors.get("ready", 1.0), "rounds": rounds}
    return found


def test_goals_are_reached_or_missed_by_the_best_peer_of_the_run() -> None:
    better = {"output_tok_per_s": 1.4, "decode_tok_per_s": 1.1, "ttft_ms_mean": 0.4, "itl_ms_p99": 1.2, "ready": 0.2}
    found = run_of(phloem={**better, "cold": 0.95}, vllm={"output_tok_per_s": 1.2}, sglang={"ttft_ms_mean": 0.9})
    rows = {row["goal"]: row for row in gpu_goals.reached(found)}
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts["one stream, decode tok/s"] == verdicts["32 in flight, mean TTFT"] == verdicts["ready"] == "reached"
    assert (
        rows["32 in flight, tok/s"]["ratio"] == pytest.approx(1.4 / 1.2)
        and rows["32 in flight, tok/s"]["who"] == "vllm"
    )
    assert rows["32 in flight, mean TTFT"]["ratio"] == pytest.approx(0.4 / 0.9)
    assert verdicts["shared prefix, tok/s"] == verdicts["32 in flight, ITL p99"] == "missed"
    assert verdicts["128: cold tok/s over warm"] == "reached" and len(rows) == len(gpu_goals.GOALS) + 4
    assert all(row["run"] == "this" for row in rows.values())
    assert "another run" not in "\n".join(gpu_goals.page(found))


def test_without_peers_another_run_is_compared_with_and_said_to_be_one() -> None:
    found = run_of(phloem={"output_tok_per_s": 40.0})
    assert all(row["verdict"].startswith("open") for row in gpu_goals.reached(found) if "cold" not in row["goal"])
    found["earlier"] = gpu_goals.earlier("NVIDIA H200")
    rows = {row["goal"]: row for row in gpu_goals.reached(found)}
    one = rows["32 in flight, tok/s"]
    assert one["who"] == "sglang 0.5.15" and one["ratio"] == pytest.approx(4000 / 3655) and "another run" in one["run"]
    lines = [line for line in gpu_goals.page(found) if "sglang" in line]
    assert len(lines) == len(gpu_goals.GOALS) and all("against another run" in line for line in lines)
    assert "figures are of another run, 2026-11-27 at dd7f28f" in gpu_goals.page(found)[-1]
    assert gpu_goals.earlier("pretended card of 141 GiB") == {} and gpu_goals.earlier("NVIDIA H100 80GB HBM3")


def test_figures_of_nothing_are_compared_without_dividing_by_them() -> None:
    found = run_of(phloem={}, vllm={"itl_ms_p99": 0.0})
    rows = {row["goal"]: row for row in gpu_goals.reached(found)}
    assert (
        rows["32 in flight, ITL p99"]["ratio"] == float("inf") and rows["32 in flight, ITL p99"]["verdict"] == "missed"
    )
    rows = {row["goal"]: row for row in gpu_goals.reached(run_of(phloem={"itl_ms_p99": 0.0}, vllm={"itl_ms_p99": 0.0}))}
    assert rows["32 in flight, ITL p99"]["verdict"] == "reached"


def test_what_was_not_measured_is_open() -> None:
    found = run_of(phloem={}, vllm={})
    del found["engines"]["phloem"]["rounds"]["shared"]
    found["engines"]["vllm"]["rounds"]["128"].pop()
    verdicts = {row["goal"]: row["verdict"] for row in gpu_goals.reached(found)}
    assert verdicts["shared prefix, tok/s"] == "open: not measured"
    assert verdicts["128 in flight, tok/s"] == "open: no peer to compare with"
    assert gpu_goals.page({"engines": {}, "skipped": {"phloem": "no"}}) == []
