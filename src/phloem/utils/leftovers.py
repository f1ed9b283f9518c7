"""Files and folders that outlive a process that is killed: named after it, so that a later start of the same user can
tell and remove them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from time import time

MEMORY = Path("/dev/shm")
KINDS = ("ranks", "weights", "films")
# Of a folder of ranks whose owner cannot be looked at, in another namespace of processes: it is gone once all have met.
OLD_SECONDS = 3600.0
_NAME = re.compile(r"phloem-[a-z]+-(\d+)\.(\d+)\.(\d+)-")


def prefix(kind: str) -> str:
    """How the name of something begins that this process makes and removes. `kind`: one of `KINDS`."""
    return f"phloem-{kind}-{os.getpid()}.{_began(os.getpid()) or 0}.{_namespace()}-"


def in_memory() -> Path:
    """Where what must not be written to a disk lies, where there is such a place."""
    return MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def sweep(*places: Path) -> None:
    """Remove what processes of this user have left there (in memory and the folder of temporary files, where no place
    is said), if they are gone. Nothing is raised."""
    for place in places or {MEMORY, Path(tempfile.gettempdir())}:
        for kind in KINDS:
            for path in place.glob(f"phloem-{kind}-*"):
                with contextlib.suppress(OSError):
                    if _left(path):
                        _remove(path)


def _left(path: Path) -> bool:
    found = path.lstat()
    if found.st_uid != os.getuid() or path.is_symlink():
        return False
    name = _NAME.match(path.name)
    if name is None or int(name[3]) != _namespace():
        return path.name.startswith("phloem-ranks-") and time() - found.st_mtime > OLD_SECONDS
    began = _began(int(name[1]))
    return began is None or began != int(name[2])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _began(pid: int) -> int | None:
    """When a process began, in the system's ticks (0: that is not told); None: there is none, or it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return 0 if _lives(pid) else None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
