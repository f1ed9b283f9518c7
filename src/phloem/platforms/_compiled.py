"""Kernels that are compiled at their first launch: where the results are kept, what was compiled, and compiling early.

The cache outlives the process. Its directory is named after everything that decides what a kernel becomes: the device,
the versions of the compiler and of torch, and the kernels' source.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from phloem import kernels
from phloem.core.config import cache_home, child_environment, environment_of
from phloem.utils import log

_log = log.get("platforms.kernels")

KEPT = 4  # directories of other devices and versions
USERS_CACHE = "TRITON_CACHE_DIR"


@dataclass
class Tally:
    """Kernels that this process has loaded since its start. `ready`: from then on a compilation is a fault."""

    compiled: int = 0
    loaded: int = 0  # from the cache
    seconds: float = 0.0
    late: list[str] = field(default_factory=list)  # compiled when requests were being served
    ready: bool = False

    def note(self, name: str, hit: bool, seconds: float) -> None:
        self.seconds += seconds
        if hit:
            self.loaded += 1
            return
        self.compiled += 1
        if self.ready:
            self.late.append(name)
            _log.warning("the kernel %s was compiled in %.2f s while serving", name, seconds)

    def facts(self) -> dict[str, Any]:
        return {
            "compiled": self.compiled,
            "loaded": self.loaded,
            "seconds": round(self.seconds, 3),
            "late": list(self.late),
        }


class Service:
    """A process that compiles ahead. `wait` gives what it wrote, or why there is nothing."""

    def __init__(self, module: str, plan: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self._begun = perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(environment or {}),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(plan).encode())
        self._process.stdin.close()
        self._process.stdin = None

    def wait(self, seconds: float) -> tuple[dict[str, Any] | None, str]:
        """(What it found, "") or (None, why not), after at most these seconds."""
        try:
            out, err = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.close()
            return None, f"not done after {perf_counter() - self._begun:.0f} s"
        if self._process.returncode != 0:
            lines = err.decode(errors="replace").strip().splitlines() or ["no message"]
            return None, f"exit status {self._process.returncode}: {lines[-1][:300]}"
        try:
            return json.loads(out), ""
        except ValueError:
            return None, "no answer"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Compiled:
    """Kernels of one device. `target`: backend, architecture and warp size, as the compiler names them."""

    def __init__(self, target: tuple[str, int | str, int], processors: int, device: str) -> None:
        self.target, self.processors = target, processors
        self.tally = Tally()
        self.directory = _directory(device)

    def begin(self) -> None:
        """Keep what is compiled from now on, and count it. Without the compiler nothing happens."""
        if importlib.util.find_spec("triton") is None:
            return
        knobs: Any = importlib.import_module("triton").knobs
        self.directory.mkdir(parents=True, exist_ok=True)
        if environment_of(USERS_CACHE) is None:
            self.directory.touch()
            _drop_old(self.directory)
            knobs.cache.dir = str(self.directory)
        note = self.tally.note

        def listener(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
            note(str(src.name), cache_hit, times.total / 1e6)

        knobs.compilation.listener = listener

    def start(self, module: str, plan: dict[str, Any]) -> Service:
        """Start `module` with a plan, to which this adds the target, its processors and the cache."""
        whole = plan | {"target": self.target, "processors": self.processors, "cache": str(self.directory)}
        return Service(module, whole)


def _directory(device: str) -> Path:
    """Ours, or the one that the user has named."""
    asked = environment_of(USERS_CACHE)
    if asked is not None:
        return Path(asked)
    key = hashlib.sha256()
    for text in (device, _version("triton"), torch.__version__):
        key.update(text.encode() + b"\0")
    folder = Path(next(iter(kernels.__path__))) / "triton"
    for file in sorted(folder.glob("*.py")):
        key.update(file.name.encode() + b"\0" + file.read_bytes())
    return cache_home() / "kernels" / key.hexdigest()[:24]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _drop_old(mine: Path) -> None:
    """Of the other directories only the ones that were used last stay. Processes that start together all do this."""
    others: list[tuple[float, Path]] = []
    for path in mine.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another one has dropped it
            if path.is_dir() and path != mine:
                others.append((path.stat().st_mtime, path))
    for _, path in sorted(others, reverse=True)[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
