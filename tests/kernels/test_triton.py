"""Runs the kernel tests, one process per file, under Triton's interpreter: no GPU is needed.

The interpreter is wrong on bfloat16, so these tests use float32 and float16.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [
    "attention",
    "elementwise",
    "engine",
    "experts",
    "gemm",
    "gguf",
    "linear",
    "many",
    "moe",
    "narrow",
    "narrow_experts",
    "recurrent",
    "sample",
    "scan",
    "shared",
    "sparse",
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on already")
@pytest.mark.parametrize("subject", FILES)
def test_under_the_interpreter(subject: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-o",
            "addopts=",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(HERE / f"test_triton_{subject}.py"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
