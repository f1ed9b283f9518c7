"""The native library is optional: where it cannot be compiled, building goes on and says what will serve instead."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_native_sanitizers import build_flags

from phloem.cli import doctor
from phloem.kernels import _native_build, _native_runtime

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
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
    # Said on stderr as well, and in a note that goes where the library would be.
    assert "*** phloem: native CPU kernels were not built" in done.stderr
    note = _native_build.failure(tmp_path / "phloem" / "kernels")
    assert note is not None and "no-such-compiler" in note


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_where_a_compiler_is_the_library_is_built() -> None:
    """Many tests skip without it: a build that failed would pass for a machine that has no compiler."""
    _native_runtime.runtime()  # raises Unavailable, with the reason


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "phloem.kernels._cpu", None)
    _native_runtime.runtime.cache_clear()
    try:
        with pytest.raises(_native_runtime.Unavailable, match=r"C\+\+ compiler"):
            _native_runtime.runtime()
    finally:
        _native_runtime.runtime.cache_clear()


def test_a_failed_build_is_told_where_the_library_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / _native_build.FAILURE).write_text("compiling each.rope failed: no such register\n")
    assert _native_build.failure(tmp_path) == "compiling each.rope failed: no such register"
    monkeypatch.setattr(_native_build, "HERE", tmp_path)
    monkeypatch.setattr(_native_build.failure, "__defaults__", (tmp_path,))
    assert "NOT BUILT: compiling each.rope failed" in doctor.native_state()
    monkeypatch.setitem(sys.modules, "phloem.kernels._cpu", None)
    _native_runtime.runtime.cache_clear()
    try:
        with pytest.raises(_native_runtime.Unavailable, match="no such register"):
            _native_runtime.runtime()
    finally:
        _native_runtime.runtime.cache_clear()


def test_the_digest_knows_every_source_and_no_test(tmp_path: Path) -> None:
    csrc = tmp_path / "cpu"
    (csrc / "tests").mkdir(parents=True)
    (csrc / "a.cpp").write_text("int a;")
    first = _native_build.digest(csrc)
    (csrc / "tests" / "driver.cpp").write_text("int b;")
    (csrc / "README.md").write_text("words")
    assert _native_build.digest(csrc) == first and _native_build.stale(first, csrc) is None
    (csrc / "b.h").write_text("int b;")
    assert _native_build.digest(csrc) != first
    assert "install again" in (_native_build.stale(first, csrc) or "")
    assert _native_build.stale(first, tmp_path / "none") is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_objects_are_kept_while_what_they_are_made_of_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = build_flags()
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    source, header, target = tmp_path / "a.cpp", tmp_path / "a.h", tmp_path / "a.o"
    source.write_text('#include <cstdint>\n#include "a.h"\nint64_t a() { return A; }\n')
    header.write_text("#define A 1\n")
    build = ["g++", "-MMD", "-c", str(source), "-o", str(target), "-MF", str(tmp_path / "a.d")]
    made = SimpleNamespace(warn=lambda text: None)
    assert not setup.fresh(target, source)
    assert setup.BuildNative._compile(made, (source, target, build)) is None and setup.fresh(target, source)
    os.utime(header)  # as a checkout of another branch and back does
    assert setup.fresh(target, source)
    header.write_text("#define A 2\n")
    assert not setup.fresh(target, source)
    header.write_text("#define A nonsense\n")
    failed = setup.BuildNative._compile(made, (source, target, build))
    assert "nonsense" in failed and not target.exists() and not setup.fresh(target, source)


def test_objects_of_another_checkout_are_compiled_again(tmp_path: Path) -> None:
    """A folder of objects that was copied names the other one's sources: what changed here cannot be seen by them."""
    setup = build_flags()
    here, there, target = setup.CSRC / "each" / "rope.cpp", tmp_path / "rope.cpp", tmp_path / "each.rope.o"
    target.write_text("")
    for source, kept in ((here, True), (there, False)):
        there.write_text("int a;")
        target.with_suffix(".d").write_text(f"{target}: {source} \\\n /usr/include/math.h\n")
        target.with_suffix(".sum").write_text(setup.made_of(target, source))
        assert setup.fresh(target, here) is kept
