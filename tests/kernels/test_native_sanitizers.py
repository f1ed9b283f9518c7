"""Kernels under AddressSanitizer and UBSan, by a C++ driver with buffers of exact size; and what the linker sees."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_support import build_flags

from phloem.utils.machine import cpu_flags

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "cpu"
KERNELS = ("attention", "packed_attention", "elementwise", "norm", "rope", "sample", "linear", "screen", "moe")
KERNELS += ("adapters", "recurrent")
# Units that also exist with AMX's tiles and with AVX-VNNI's products; they run on emulated ones here.
AMX = ("linear", "moe")
VNNI = ("linear", "moe", "attention")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")]


def levels_here() -> list[str]:
    """The levels of whole units that this machine runs."""
    flags, found = cpu_flags(), ["portable"]
    if {"avx2", "fma"} <= flags:
        found.append("avx2")
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni", "avx512_bf16"} <= flags:
        found.append("avx512")
    return found


def compile_all(jobs: list[list[str]]) -> None:
    def one(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    with ThreadPoolExecutor(2) as workers:
        list(workers.map(one, jobs))


@pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers are set up for Linux")
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """At the machine's best level, and the portable one; with --every at those between them too."""
    probe = subprocess.run(
        ["g++", "-fsanitize=address,undefined", "-x", "c++", "-", "-o", str(tmp_path / "probe")],
        input="int main() {}", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if probe.returncode:
        pytest.skip("this compiler has no sanitizer libraries")
    setup = build_flags()
    common = [flag for flag in setup.COMMON if flag not in ("-O3", "-fvisibility=hidden")] + ["-O0", *SANITIZE]
    levels = levels_here()
    if not pytestconfig.getoption("--every"):
        levels = sorted({levels[0], levels[-1]}, key=levels.index)
    sources = [(CSRC / "each" / f"{name}.cpp", level) for name in KERNELS for level in levels]
    sources += [
        (path, "portable")
        for path in (
            CSRC / "pool.cpp",
            CSRC / "registry.cpp",
            CSRC / "linear_pack.cpp",
            *(CSRC / "tests").glob("*.cpp"),
        )
    ]
    flags = {
        **setup.LEVELS,
        "emulated": [*setup.LEVELS["avx512"], "-DPHL_AMX=1", "-DPHL_AMX_EMULATED"],
        "emulated-vnni": [*setup.LEVELS["avx2"], "-DPHL_VNNI=1", "-DPHL_VNNI_EMULATED"],
    }
    if "avx2" in levels:
        sources += [(CSRC / "avxvnni" / f"{name}.cpp", "emulated-vnni") for name in VNNI]
    if "avx512" in levels:
        sources += [(CSRC / "amx" / f"{name}.cpp", "emulated") for name in AMX]
    folder = ROOT / "build" / "sanitized"  # kept: compiling takes far longer than running
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{path.parent.name}.{path.stem}.{level}.o" for path, level in sources]
    headers = max(path.stat().st_mtime for path in (*CSRC.rglob("*.h"), ROOT / "setup.py", Path(__file__)))
    compile_all(
        [
            ["g++", *common, *flags[level], "-c", str(path), "-o", str(target)]
            for (path, level), target in zip(sources, objects, strict=True)
            if not target.exists() or target.stat().st_mtime <= max(headers, path.stat().st_mtime)
        ]
    )
    program = tmp_path / "driver"
    compile_all([["g++", *SANITIZE, *map(str, objects), "-pthread", "-o", str(program)]])
    done = subprocess.run([str(program), *levels], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tests" in done.stdout


@pytest.mark.parametrize(("level", "names"), [("amx", AMX), ("avxvnni", (*VNNI, "limits"))])
def test_derived_levels_are_built_where_the_compiler_knows_them(
    level: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    setup = build_flags()
    assert setup.accepts(["g++"], [], tmp_path)
    assert not setup.accepts(["g++"], ["-mno-such-instructions"], tmp_path)
    units = {path.stem for path, unit in setup.units(CSRC, "x86_64") if unit == level and path.parent.name == level}
    assert units == set(names)
    assert setup.PARTIAL[level] and set(setup.PARTIAL[level]) <= set(setup.LEVELS[level])


def test_units_share_no_weak_symbols() -> None:
    """An inline function compiled for AVX-512 must never be the one that the linker keeps for every level."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    spec = importlib.util.find_spec("phloem.kernels._cpu")
    objects = [
        path for level in ("avx2", "avxvnni", "avx512", "amx") for path in ROOT.glob(f"build/native/*/*.{level}.o")
    ]
    if spec is None or not objects:
        pytest.skip("the native library was not built in this folder")
    for path in objects:
        listed = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True)
        weak = [line for line in listed.stdout.splitlines() if line[17:18] in "WVu"]
        assert not weak, f"{path.name}: {weak[:5]}"
