"""Kernels compile ahead of time for GPUs that are not here. All of them: scripts/triton_compile.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "triton_compile.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The script must be able to compile although its caller interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=900
    )


def test_quick_set_compiles_for_nvidia_and_amd(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = _run("--quick", "--targets", "sm_90,gfx942", "--json", str(report))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    results = json.loads(report.read_text())
    kernels = {(r["target"], r["kernel"]) for r in results}
    assert {("sm_90", "_attention"), ("gfx942", "_attention"), ("sm_90", "_sample"), ("gfx942", "_grouped")} <= kernels
    assert all(r["registers"] and r["shared"] is not None for r in results)


def test_every_kernel_is_among_the_cases() -> None:
    """A kernel that no case launches would never be compiled."""
    code = (
        "import triton_compile as c; from triton_cases import cases;"
        "print(sorted(c.all_kernels() - {l.kernel for l in c.record(cases(), 'sm_90')}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_errors_fail_the_script() -> None:
    done = _run("--targets", "sm_12345")
    assert done.returncode == 2 and "known: sm_80" in done.stderr
