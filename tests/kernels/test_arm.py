"""The ops' C++ tests for Arm processors, cross-compiled and run by an emulator: `make test-arm`."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_support import build_flags

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc" / "cpu"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    "PHLOEM_TEST_ARM" not in os.environ, reason="compiles for minutes: set PHLOEM_TEST_ARM, or make test-arm"
)
def test_ops_of_each_level_agree_with_the_portable_ones(tmp_path: Path) -> None:
    for program in (COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    setup = build_flags()
    once = [CSRC / "pool.cpp", CSRC / "registry.cpp", CSRC / "linear_pack.cpp"]
    once += [path for path in sorted((CSRC / "tests").glob("*.cpp")) if path.name != "amx.cpp"]
    jobs = [(path, "portable") for path in once]
    jobs += [(path, level) for path in sorted((CSRC / "each").glob("*.cpp")) for level in ("portable", "neon")]
    jobs += [(path, "i8mm") for path in sorted((CSRC / "i8mm").glob("*.cpp"))]
    folder = ROOT / "build" / "arm"  # kept: compiling takes longer than running
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in (*CSRC.rglob("*.h"), ROOT / "setup.py"))
    flags = [flag for flag in setup.COMMON if flag != "-fvisibility=hidden"]  # as the kernels of a wheel

    def build(job: tuple[Path, str]) -> Path:
        source, level = job
        target = folder / f"{source.parent.name}.{source.stem}.{level}.o"
        if not target.exists() or target.stat().st_mtime <= max(newest, source.stat().st_mtime):
            command = [COMPILER, *flags, *setup.LEVELS[level], "-c", str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
        return target

    with ThreadPoolExecutor(2) as workers:
        objects = list(workers.map(build, jobs))
    program = tmp_path / "driver"
    subprocess.run([COMPILER, *map(str, objects), "-static", "-pthread", "-o", str(program)], check=True)
    # A processor without matrix products of bytes, and one with them.
    for processor, levels, best in (("cortex-a76", "portable neon", "neon"), ("max", "i8mm", "i8mm")):
        command = [EMULATOR, "-cpu", processor, str(program), *levels.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"best level {best}" in done.stdout


def test_every_kind_of_processor_is_built_for_with_its_levels() -> None:
    units = build_flags().units
    levels = {
        machine: {level for _, level in units(CSRC, machine)} for machine in ("x86_64", "aarch64", "arm64", "riscv64")
    }
    assert levels["x86_64"] == {"portable", "avx2", "avxvnni", "avx512", "amx"}
    assert levels["aarch64"] == levels["arm64"] == {"portable", "neon", "i8mm"}
    assert levels["riscv64"] == {"portable"}
