"""Processes that import this as they start (a `sitecustomize` on their path) break as they are told.

`ABSENT=msgspec,gguf`: these packages cannot be imported. `FAULTS=gpu_bench:bench_decode=raise@2;...`: at its second
call (every one, without a number) the function of that module, or method of a class of it, raises; or `memory`: is out
of it; `hang`: sleeps; `stop`: its process is stopped; `die`: killed; `exit`: ends; `dead`: raises as a device does that
an illegal access has ended; `orphan`: leaves a process that outlives it; `litter`: leaves a file in shared memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ABSENT = {name for name in os.environ.get("ABSENT", "").split(",") if name}
# module -> what of it, what that does
FAULTS: dict[str, list[tuple[str, str]]] = {}
for told in filter(None, os.environ.get("FAULTS", "").split(";")):
    place, _, what = told.partition("=")
    module, _, name = place.partition(":")
    FAULTS.setdefault(module, []).append((name, what))


def _break(kind: str) -> None:
    if kind == "raise":
        raise RuntimeError("a fault was put in")
    if kind == "dead":
        raise RuntimeError("CUDA error: an illegal memory access was encountered (a fault was put in)")
    if kind == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory (a fault was put in)")
    if kind == "hang":
        time.sleep(3600)
    if kind in ("stop", "die"):
        os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    if kind == "exit":
        os._exit(7)
    if kind == "orphan":
        line = [sys.executable, "-S", "-c", "import time; time.sleep(3600)"]
        subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if kind == "litter":
        Path(f"/dev/shm/phloem-weights-{os.getpid()}.0.0-fault").write_text("left")


def _broken(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    kind, _, number = what.partition("@")
    calls = 0

    def instead(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if not number or calls == int(number):
            _break(kind)
        return function(*args, **options)

    return instead


class _Breaking(Loader):
    """Loads a module and then breaks what is to be broken."""

    def __init__(self, loader: Loader, faults: list[tuple[str, str]]) -> None:
        self._loader, self._faults = loader, faults

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for name, what in self._faults:
            *path, last = name.split(".")
            holder: Any = module
            for part in path:
                holder = getattr(holder, part)
            setattr(holder, last, _broken(getattr(holder, last), what))


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name not in FAULTS:
            return None
        for finder in sys.meta_path:
            if finder is not _Finder and (spec := finder.find_spec(name, path, target)) is not None:
                assert spec.loader is not None
                spec.loader = _Breaking(spec.loader, FAULTS[name])
                return spec
        return None


sys.meta_path.insert(0, _Finder)
