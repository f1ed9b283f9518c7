"""Builds the native CPU kernels: every unit with its own instruction-set flags, in parallel, only what changed.

The library is optional: without a compiler, or where compiling fails, the installation goes on and the reference ops
serve. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc" / "cpu"
COMMON = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
COMMON += ["-Wno-psabi", "-Wno-unused-parameter", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "cd", "vbmi", "vnni", "bf16")]
LEVELS = {
    "portable": ["-DPHL_LEVEL=0"],
    "avx2": ["-DPHL_LEVEL=1", *AVX2],
    "avx512": ["-DPHL_LEVEL=2", *AVX2, *AVX512, "-mprefer-vector-width=512"],
}
AMX = ["-mamx-tile", "-mamx-int8", "-mamx-bf16"]
LEVELS["amx"] = [*LEVELS["avx512"], "-DPHL_AMX=1", *AMX]


def units(csrc: Path, machine: str) -> list[tuple[Path, str]]:
    """(source, level) of every object; the x86 levels only where they mean something."""
    x86 = machine.lower() in ("x86_64", "amd64")
    levels = list(LEVELS) if x86 else ["portable"]
    everywhere = [level for level in levels if level != "amx"]
    found = [(path, "portable") for path in sorted(csrc.glob("*.cpp"))]
    found += [(path, level) for path in sorted((csrc / "each").glob("*.cpp")) for level in everywhere]
    found += [(path, level) for level in levels[1:] for path in sorted((csrc / level).glob("*.cpp"))]
    return found


def accepts(compiler: list[str], flags: list[str], folder: Path) -> bool:
    """Whether a compiler knows these flags."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    command = [*compiler, *flags, "-c", str(probe), "-o", str(folder / "probe.out")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fresh(target: Path) -> bool:
    """Whether an object is newer than all it was made of, which the compiler wrote beside it, and than this file."""
    made_of = target.with_suffix(".d")
    if not target.exists() or not made_of.exists():
        return False
    names = made_of.read_text().replace("\\\n", " ").split(": ", 1)[1].split()
    sources = [Path(__file__), *map(Path, names)]
    return all(path.exists() and path.stat().st_mtime < target.stat().st_mtime for path in sources)


class BuildNative(build_ext):
    """`build_ext` that compiles `units`; a failure is a warning, never the end of the installation."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.warn(f"native CPU kernels were not built, the slower reference ops will serve: {error}")

    def build_extension(self, ext: Extension) -> None:
        from setuptools._distutils.sysconfig import customize_compiler

        customize_compiler(self.compiler)
        compiler = [part for part in self.compiler.compiler_cxx if not part.startswith(("-W", "-O", "-g"))]
        objects = Path(self.build_temp).absolute()
        objects.mkdir(parents=True, exist_ok=True)
        todo: list[tuple[Path, list[str]]] = []
        outputs: list[str] = []
        amx = accepts(compiler, AMX, objects)
        for source, level in units(CSRC, platform.machine()):
            if level == "amx" and not amx:
                continue
            target = objects / f"{source.parent.name}.{source.stem}.{level}.o"
            outputs.append(str(target))
            if fresh(target):
                continue
            flags = ["-MMD", *COMMON, *LEVELS[level], *(f"-I{path}" for path in self.include_dirs)]
            todo.append((source, [*compiler, *flags, "-c", str(source), "-o", str(target)]))
        with ThreadPoolExecutor(self.parallel or 2) as workers:
            list(workers.map(self._compile, todo))
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        library.parent.mkdir(parents=True, exist_ok=True)
        shared = (
            ["-bundle", "-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-shared", "-pthread"]
        )
        subprocess.run([*compiler, *shared, *outputs, "-o", str(library)], check=True)

    def _compile(self, job: tuple[Path, list[str]]) -> None:
        source, command = job
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stderr:
            self.warn(done.stderr)
        if done.returncode:
            raise RuntimeError(f"compiling {source.name} failed")


setup(
    ext_modules=[Extension("phloem.kernels._cpu", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
