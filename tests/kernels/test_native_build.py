"""The native library is optional: where it cannot be compiled, building goes on and says what will serve instead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phloem.kernels import _native_runtime

ROOT = Path(__file__).parents[2]


def test_without_a_compiler_the_build_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(tmp_path / "t"),
        "--build-lib",
        str(tmp_path),
    ]
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "the slower reference ops will serve" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "phloem.kernels._cpu", None)
    _native_runtime.runtime.cache_clear()
    try:
        with pytest.raises(_native_runtime.Unavailable, match=r"C\+\+ compiler"):
            _native_runtime.runtime()
    finally:
        _native_runtime.runtime.cache_clear()
