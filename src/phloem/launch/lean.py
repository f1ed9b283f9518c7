"""torch imported as a server needs it: without what it makes for compilers, and without reading its own sources.

`torch._meta_registrations`, with the decompositions and reference implementations that it imports, is a quarter of
`import torch`. It tells what shapes operators give on the device `meta`; who computes needs none of it. It is loaded
when somebody imports it, or a package that compiles or may put modules on `meta`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType, TracebackType
from typing import Any

METAS = "torch._meta_registrations"
# What METAS imports, and what can only be imported behind it.
PARTS = frozenset({"torch._decomp", "torch._prims", "torch._refs", "torch.utils._content_store"})
USERS = frozenset(
    {"accelerate", "diffusers", "peft", "timm", "torch._dynamo", "torch._inductor", "torchaudio", "torchvision"}
    | {"transformers"}
)


class _Absent(ModuleType):
    """Stands for METAS while torch is imported. A look into it loads it after all."""

    __file__ = None  # `inspect` goes through all modules, and asks each of them for this

    def __getattr__(self, name: str) -> Any:
        _leave(self)
        return getattr(import_module(METAS), name)


class _There(Loader):
    """Of a module that has been loaded since somebody asked for it."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # which the import system has put another in the place of


class _Ahead(MetaPathFinder):
    """METAS before any of PARTS and USERS."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in USERS | PARTS or METAS in sys.modules:
            return None
        import_module(METAS)
        # Were it still there, the import system would take its own spec, and execute it once more.
        there = sys.modules.pop(name, None)
        return None if there is None else ModuleSpec(name, _There(there))


def _leave(absent: ModuleType) -> None:
    if sys.modules.get(METAS) is absent:
        del sys.modules[METAS]
    names = vars(sys.modules["torch"]) if "torch" in sys.modules else {}
    name = METAS.rpartition(".")[2]
    if names.get(name) is absent:
        del names[name]


def _place(frame: FrameType | TracebackType, context: int = 1, whole: Any = inspect.getframeinfo) -> inspect.Traceback:
    return whole(frame, 0)


@contextmanager
def imports() -> Generator[None]:
    """For the first import of torch in this process, which happens within.

    Operators that torch defines in Python note where, as a file and a line. For that `inspect` would also read the file
    and look through all modules, to tell what stands in that line, which nobody asks for.
    """
    if "torch" in sys.modules:
        yield
        return
    whole, absent = inspect.getframeinfo, _Absent(METAS)
    sys.modules[METAS], inspect.getframeinfo = absent, _place
    try:
        yield
    finally:
        inspect.getframeinfo = whole
        _leave(absent)
        sys.meta_path.insert(0, _Ahead())
        if not PARTS.isdisjoint(sys.modules):  # somebody wanted them within
            import_module(METAS)
