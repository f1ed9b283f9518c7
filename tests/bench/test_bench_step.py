"""`bench step`: the share of idle time out of intervals, figures out of a trace, and the command on a tiny model."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from phloem.bench import step
from phloem.bench._timeline import covered, device_figures, device_spans, host_ops, idle_share, launch_count
from phloem.core.errors import BadRequest
from phloem.platforms._facts import StepFacts
from phloem.platforms.cpu import Platform
from phloem.testing.checkpoints import tiny_checkpoint


@pytest.mark.parametrize(
    ("intervals", "window", "expected"),
    [
        ([], (0, 10), 0),
        ([(0, 4), (6, 10)], None, 8),
        ([(6, 10), (0, 4)], None, 8),  # any order
        ([(0, 6), (4, 10), (5, 7)], None, 10),  # overlapping, and one inside another
        ([(0, 4), (4, 10)], None, 10),  # touching
        ([(-5, 2), (8, 20)], (0, 10), 4),  # cut at the window
        ([(20, 30)], (0, 10), 0),
        ([(3, 3)], None, 0),
    ],
)
def test_covered(intervals: list[tuple[float, float]], window: Any, expected: float) -> None:
    assert covered(intervals, window) == expected


def test_idle_share() -> None:
    assert idle_share([(0, 4), (6, 10)]) == pytest.approx(0.2)
    assert idle_share([(0, 4), (6, 10)], (0, 20)) == pytest.approx(0.6)
    assert idle_share([], (0, 5)) == 1.0
    assert idle_share([(-1, 6)], (0, 5)) == 0.0
    for wrong in ([], [(2, 2)]):
        with pytest.raises(ValueError, match="window"):
            idle_share(wrong)


@pytest.mark.parametrize("seed", range(5))
def test_idle_share_is_what_counting_moments_gives(seed: int) -> None:
    rng = random.Random(seed)
    intervals = [(start := rng.randrange(100), start + rng.randrange(1, 9)) for _ in range(12)]
    moments = sum(any(start <= at < end for start, end in intervals) for at in range(20, 90))
    assert idle_share(intervals, (20, 90)) == pytest.approx(1 - moments / 70)


def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


TRACE: dict[str, Any] = {
    "traceEvents": [
        {"ph": "M", "name": "process_name"},
        event("cpu_op", "aten::mm", 0, 900),
        event("cuda_runtime", "cudaGraphLaunch", 5, 3),
        event("cuda_runtime", "cudaLaunchKernel", 9, 3),
        event("cuda_driver", "cuLaunchKernelEx", 12, 3),
        event("cuda_runtime", "cudaEventRecord", 15, 3),
        event("kernel", "gemm", 100, 40),
        event("kernel", "attention", 130, 30),  # on another stream, beside the other one
        event("gpu_memcpy", "Memcpy HtoD", 200, 20),
        event("kernel", "gemm", 260, 40),
        {"ph": "i", "cat": "kernel", "name": "instant", "ts": 900},
    ]
}


def test_figures_of_a_trace() -> None:
    assert [span.name for span in device_spans(TRACE)] == ["gemm", "attention", "Memcpy HtoD", "gemm"]
    assert launch_count(TRACE) == 3
    found = device_figures(TRACE, steps=2, top=1)
    assert found is not None
    assert found["device_wall_ms"] == pytest.approx(0.1) and found["device_busy_ms"] == pytest.approx(0.06)
    assert found["device_idle"] == pytest.approx(0.4)
    assert found["launches"] == 1.5 and found["kernels"] == 2
    assert found["top"] == [{"name": "gemm", "ms": pytest.approx(0.04), "count": 1.0}]
    assert device_figures({"traceEvents": TRACE["traceEvents"][:6]}, 2) is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def run(tiny: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, dict[str, Any]]:
    base = [str(tiny), "--threads", "1", "--steps", "6", "--context", "20", "--prefill", "32"]
    assert step.main([*base, *flags]) == 0
    text = capsys.readouterr().out
    return text, json.loads(text.strip().splitlines()[-1])


def test_on_a_cpu_it_tells_what_is_outside_the_replay(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, output = tmp_path / "made" / "trace.json", tmp_path / "runs.jsonl"
    flags = ("--batch", "2", "--trace", str(trace), "--output", str(output), "--dtype", "bfloat16")
    text, record = run(tiny, capsys, *flags)
    events = json.loads(trace.read_text())["traceEvents"]
    assert record["batch"] == 2 and record["wall_ms"] > 0 and record["prefill_ms"] > 0
    assert json.loads(output.read_text())["steps"] == 6
    assert "prefill of 32 tokens" in text and "decode of 2 rows at 20 tokens" in text
    if record["replayed_steps"]:
        assert record["replayed_steps"] == 6 and 0 < record["outside_replay"] < 1
        assert "outside the native step replay" in text
        assert sum(item.get("name") == "replay of a step of 2 rows" for item in events) == 6
        layers = json.loads((tiny / "config.json").read_text())["num_hidden_layers"]
        assert [op["count"] for op in json.loads(output.read_text())["top"] if op["name"] == "linear"] == [4 * layers]
        assert " linear\n" in text


@pytest.mark.slow
def test_eager_steps_and_dummy_weights(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json.gz"
    flags = ("--load-format", "dummy", "--disable-step-graph", "--trace", str(trace), "--ops", "reference")
    text, record = run(tiny, capsys, *flags, "--dtype", "float32")
    assert record["outside_replay"] is None and "ran eagerly" in text
    with gzip.open(trace, "rt") as file:
        names = {item.get("name") for item in json.load(file)["traceEvents"]}
    assert "aten::mm" in names or "aten::linear" in names  # of the runner's own thread
    assert "aten::" in text


def test_steps_are_recorded_before_they_are_timed() -> None:
    assert max(StepFacts().patience, Platform.facts.patience) < step.WARM


def test_an_operators_own_time() -> None:
    def op(name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": tid}

    events = [op("linear", 0, 100), op("t", 1, 9), op("mm", 10, 80), op("add", 100, 30), op("mm", 50, 40, tid=2)]
    found = host_ops({"traceEvents": events}, steps=2, top=3)
    assert found == [
        {"name": "mm", "ms": pytest.approx(0.06), "count": 1.0},
        {"name": "add", "ms": pytest.approx(0.015), "count": 0.5},
        {"name": "linear", "ms": pytest.approx(0.0055), "count": 0.5},
    ]


def test_figures_of_a_device_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"batch": 8, "context": 1024, "wall_ms": 0.1, **(device_figures(TRACE, 2) or {})}
    step._show(record)
    text = capsys.readouterr().out
    assert "idle 40.0%" in text and "1.5 launches" in text and "gemm" in text


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--batch", "0"], "at least 1"), (["--context", "600"], "more than this model's context of 512")],
)
def test_what_cannot_be_measured(tiny: Path, flags: list[str], reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        step.main([str(tiny), *flags])
