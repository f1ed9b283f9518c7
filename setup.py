"""Builds the native CPU kernels: every unit with its own instruction-set flags, in parallel, only what changed.

The library is optional: without a compiler, or where compiling fails, the installation goes on and the reference ops
serve; then no library is left, and a note beside its place says why. Objects stay in `build/native`, a folder for each
compiler and its flags, so that one installation after another compiles once. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc" / "cpu"
KERNELS = ROOT / "src" / "phloem" / "kernels"
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
    # Without multiply-adds where the compiler likes: on Arm a row's bits would depend on how many others there are.
    "portable": ["-DPHL_LEVEL=0", "-ffp-contract=off"],
    "avx2": ["-DPHL_LEVEL=1", *AVX2],
    "avx512": ["-DPHL_LEVEL=2", *AVX2, *AVX512, "-mprefer-vector-width=512"],
}
AMX = ["-mamx-tile", "-mamx-int8", "-mamx-bf16"]
NEON = ["-march=armv8.2-a+dotprod+fp16", "-fno-schedule-insns"]  # gcc would load early, and keep on the stack
LEVELS["neon"] = ["-DPHL_LEVEL=0", "-DPHL_NEON=1", *NEON]
I8MM = [f"{NEON[0]}+i8mm+bf16", *NEON[1:]]
LEVELS["i8mm"] = ["-DPHL_LEVEL=0", "-DPHL_NEON=1", "-DPHL_I8MM=1", *I8MM]
OF_MACHINE = {name: ("avx2", "avxvnni", "avx512", "amx") for name in ("x86_64", "amd64")}
OF_MACHINE.update({name: ("neon", "i8mm") for name in ("aarch64", "arm64")})
LEVELS["amx"] = [*LEVELS["avx512"], "-DPHL_AMX=1", *AMX]
VNNI = ["-mavxvnni"]
LEVELS["avxvnni"] = [*LEVELS["avx2"], "-DPHL_VNNI=1", *VNNI]
# Levels of a few units, which compilers may not know: their flags.
PARTIAL = {"avxvnni": VNNI, "amx": AMX, "i8mm": I8MM}
# A library that runs with glibc 2.28: functions that newer ones have twice are taken in their first form.
OLD_GLIBC = ["-include", str(CSRC / "old_glibc.h")]
# gcc 12 finds, at -O3, that unpacking a block of Q2_K for AVX-512 writes nothing, and leaves the call out: what
# functions do to memory is not concluded from their bodies, by the compilers that know these words.
CAREFUL = ["-fno-ipa-modref", "-fno-ipa-pure-const"]
MOST_JOBS = 8  # compilers at a time; each takes up to half a gigabyte


def units(csrc: Path, machine: str) -> list[tuple[Path, str]]:
    """(source, level) of every object: the portable ones, and those of the processors that a machine may have."""
    levels = ["portable", *OF_MACHINE.get(machine.lower(), ())]
    everywhere = [level for level in levels if level not in PARTIAL]
    found = [(path, "portable") for path in sorted(csrc.glob("*.cpp"))]
    found += [(path, level) for path in sorted((csrc / "each").glob("*.cpp")) for level in everywhere]
    found += [(path, level) for level in levels[1:] for path in sorted((csrc / level).glob("*.cpp"))]
    return found


def target_machine() -> str:
    """The kind of processor that is built for: another than this one's where a cross-compiler is at work."""
    return sysconfig.get_platform().rsplit("-", 1)[-1] if "_PYTHON_HOST_PLATFORM" in os.environ else platform.machine()


def accepts(compiler: list[str], flags: list[str], folder: Path) -> bool:
    """Whether a compiler knows these flags."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    command = [*compiler, *flags, "-c", str(probe), "-o", str(folder / "probe.out")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def shared_code() -> ModuleType:
    """`phloem.kernels._native_build`, without importing the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("_native_build", KERNELS / "_native_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept_folder(compiler: list[str]) -> Path:
    """Where objects of this compiler with these flags stay. Raises `OSError` where there is no compiler."""
    version = subprocess.run([compiler[0], "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256(repr((compiler, version, COMMON, CAREFUL, LEVELS)).encode()).hexdigest()[:12]
    folder = ROOT / "build" / "native" / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def made_of(target: Path, source: Path) -> str | None:
    """Digest of the files that an object is made of, which the compiler wrote beside it.

    None: some are not there, or the object is of another checkout's source (a folder of objects that was copied), of
    which nothing here tells whether it has changed.
    """
    try:
        names = target.with_suffix(".d").read_text().replace("\\\n", " ").split(": ", 1)[1].split()
        if str(source) not in names:
            return None
        total = hashlib.sha256()
        for path in map(Path, names):
            # The system's headers change with the compiler, whose version names the folder.
            total.update(path.read_bytes() if path.is_relative_to(ROOT) else str(path).encode())
        return total.hexdigest()
    except (OSError, IndexError):
        return None


def fresh(target: Path, source: Path) -> bool:
    """Whether an object is there and what it was made of is as it was then, whenever it was written."""
    noted = target.with_suffix(".sum")
    return target.exists() and noted.exists() and noted.read_text() == made_of(target, source)


class BuildNative(build_ext):
    """`build_ext` that compiles `units`; a failure is told loudly, and never the end of the installation."""

    used_here = False

    def run(self) -> None:
        # Asked before the base class runs, which sets `inplace` aside and copies the library at the end.
        self.used_here = bool(self.inplace or self.editable_mode)
        try:
            super().run()
        except Exception as error:
            self._say_failed(error)

    def copy_extensions_to_source(self) -> None:
        for old in KERNELS.glob("_cpu.*.so"):
            old.unlink()  # a process may be using it: its file must not be written over
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        from setuptools._distutils.sysconfig import customize_compiler

        customize_compiler(self.compiler)
        compiler = [part for part in self.compiler.compiler_cxx if not part.startswith(("-W", "-O", "-g"))]
        objects = kept_folder(compiler)
        todo: list[tuple[Path, Path, list[str]]] = []
        outputs: list[str] = []
        wanted = units(CSRC, target_machine())
        used = {level for _, level in wanted}
        known = {level: accepts(compiler, flags, objects) for level, flags in PARTIAL.items() if level in used}
        common = [*COMMON, *(CAREFUL if accepts(compiler, CAREFUL, objects) else [])]
        for source, level in [*wanted, (self._stamp(objects), "portable")]:
            if not known.get(level, True):
                continue
            target = objects / f"{source.parent.name}.{source.stem}.{level}.o"
            outputs.append(str(target))
            if fresh(target, source):
                continue
            flags = ["-MMD", "-MF", str(target.with_suffix(".d")), *common, *OLD_GLIBC, *LEVELS[level]]
            flags += [f"-I{path}" for path in self.include_dirs]
            todo.append((source, target, [*compiler, *flags, "-c", str(source), "-o", str(target)]))
        # The long ones first, so that none of them is left to run alone.
        todo.sort(
            key=lambda job: job[0].parent.name in ("each", "avxvnni", "amx") and job[0].stat().st_size, reverse=True
        )
        jobs = self.parallel if isinstance(self.parallel, int) and self.parallel > 0 else os.cpu_count() or 2
        with ThreadPoolExecutor(min(jobs, MOST_JOBS)) as workers:
            failed = [error for error in workers.map(self._compile, todo) if error]
        if failed:
            raise RuntimeError("\n".join(failed))
        self._link(compiler, outputs, Path(self.get_ext_fullpath(ext.name)).absolute())

    def _stamp(self, objects: Path) -> Path:
        """A source that says what the library was built from."""
        stamp = objects / "stamp.cpp"
        text = (
            f'namespace phl {{ extern const char* const kBuiltFrom; const char* const kBuiltFrom = "{_digest()}"; }}\n'
        )
        if not stamp.exists() or stamp.read_text() != text:
            stamp.write_text(text)
        return stamp

    def _compile(self, job: tuple[Path, Path, list[str]]) -> str | None:
        """None, or what went wrong."""
        source, target, command = job
        target.with_suffix(".sum").unlink(missing_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stderr:
            self.warn(done.stderr)
        if done.returncode:
            target.unlink(missing_ok=True)
            return f"compiling {target.stem} failed: {first_error(done.stderr)}"
        target.with_suffix(".sum").write_text(made_of(target, source) or "")
        return None

    def _link(self, compiler: list[str], outputs: list[str], library: Path) -> None:
        """Links beside the library and puts it there at once: a process may be using the one before."""
        library.parent.mkdir(parents=True, exist_ok=True)
        mac = platform.system() == "Darwin"
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if mac else ["-shared", "-pthread"]
        made = library.with_name(f"{library.name}.{os.getpid()}")
        subprocess.run([*compiler, *shared, *outputs, "-o", str(made)], check=True)
        made.replace(library)
        for folder in self._places():
            (folder / shared_code().FAILURE).unlink(missing_ok=True)

    def _places(self) -> list[Path]:
        """Where this build's library is used from: the package that is being built, or the source tree."""
        built = Path(self.get_ext_fullpath("phloem.kernels._cpu")).absolute().parent
        return [KERNELS] if self.used_here else [built]

    def _say_failed(self, error: Exception) -> None:
        """On stderr and in a note; an older library, which is not of these sources, does not stay in their place."""
        text = f"native CPU kernels were not built, the slower reference ops will serve: {error}"
        self.warn(text)
        print(f"\n*** phloem: {text}\n", file=sys.stderr)
        for folder in self._places():
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("_cpu.*.so"):
                old.unlink()
            (folder / shared_code().FAILURE).write_text(f"{text}\n")


def first_error(text: str) -> str:
    """The first line of a compiler's output that tells of an error."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "the compiler said nothing")


def _digest() -> str:
    return shared_code().digest(CSRC)


setup(
    ext_modules=[Extension("phloem.kernels._cpu", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
