"""What the native library was built from, and what went wrong when it was not.

`setup.py` loads this file by its path, so it needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FAILURE = "_cpu.failed.txt"  # beside the library: why the last build gave none
HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "csrc" / "cpu"  # of a checkout; an installed wheel has none


def digest(csrc: Path, more: str = "") -> str:
    """Of all sources of the library, and of `more` that it depends on."""
    total = hashlib.sha256(more.encode())
    for path in sorted((*csrc.rglob("*.cpp"), *csrc.rglob("*.h"))):
        name = path.relative_to(csrc)
        if name.parts[0] != "tests":
            total.update(f"\n{name.as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def failure(folder: Path = HERE) -> str | None:
    """Why the last build failed, or None."""
    try:
        return (folder / FAILURE).read_text().strip()
    except OSError:
        return None


def stale(built_from: str, csrc: Path = SOURCES) -> str | None:
    """Why a library is not the one of this checkout's sources, or None."""
    if not csrc.is_dir() or built_from == digest(csrc):
        return None
    return "built from other sources than those in csrc/cpu: install again (pip install -e .)"
