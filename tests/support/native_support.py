"""Whether the native library is there, and how it is built."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from phloem.kernels import native

ROOT = Path(__file__).resolve().parents[2]


def built() -> bool:
    try:
        native.runtime()
    except native.Unavailable:
        return False
    return True


def build_flags() -> ModuleType:
    """`setup.py` as a module: its flags and units, without running it."""
    source = (ROOT / "setup.py").read_text().rsplit("\nsetup(", 1)[0]
    module = ModuleType("phloem_setup")
    module.__file__ = str(ROOT / "setup.py")
    exec(compile(source, "setup.py", "exec"), module.__dict__)
    return module
