"""What this process may use of the machine: cores and memory, limits of its control group included."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import resource  # at once: where memory has run out no library can be loaded any more

_CGROUP = Path("/sys/fs/cgroup")


def memory(root: Path = _CGROUP) -> tuple[int, int]:
    """(available, total) bytes, cut by the control group's limit."""
    values = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    if "MemTotal" not in values:
        return _memory_elsewhere()
    total = int(values["MemTotal"].split()[0]) * 1024
    free = int(values.get("MemAvailable", values["MemTotal"]).split()[0]) * 1024
    limit, used = _read(root / "memory.max").strip(), _read(root / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        inactive = [line for line in _read(root / "memory.stat").splitlines() if line.startswith("inactive_file ")]
        reclaimable = int(inactive[0].split()[1]) if inactive else 0
        total = min(total, int(limit))
        free = min(free, max(0, int(limit) - int(used) + reclaimable))
    space = address_space()
    if space is not None:
        total, free = min(total, space), min(free, max(0, space - _mapped()))
    return free, total


def address_space() -> int | None:
    """Bytes that this process may map (`ulimit -v`); None where there is no limit."""
    return _limit("RLIMIT_AS")


def open_files() -> int | None:
    """Files that this process may have open at a time (`ulimit -n`)."""
    return _limit("RLIMIT_NOFILE")


def allow_open_files(most: int = 65536) -> None:
    """Raise the limit of open files as far as the system lets us, to `most`: each connection is one."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _limit(name: str) -> int | None:
    if sys.platform == "win32":
        return None
    found = resource.getrlimit(getattr(resource, name))[0]
    return None if found == resource.RLIM_INFINITY else found


def _mapped() -> int:
    pages = _read(Path("/proc/self/statm")).split()
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


_MEMORY_SIGNS = (
    "can't start new thread",
    "can't allocate memory",
    "failed to map segment",
    "Cannot allocate memory",
    "error return without exception set",  # the interpreter itself, where an allocation of its own failed
)


def exhausted(error: BaseException) -> str | None:
    """What the system had too little of, and what helps, where that is why something failed."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return f"no more files can be opened, the system allows this process {open_files()}: raise it with `ulimit -n`"
    if number == errno.ENOSPC:
        return f"output cannot be written: {os.strerror(errno.ENOSPC)}"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(sign in str(error) for sign in _MEMORY_SIGNS):
        space = address_space()
        limit = f", the system allows this process {space >> 20} MiB: raise it with `ulimit -v`, or" if space else ":"
        return f"memory cannot be had{limit} make the KV pool smaller with --max-total-tokens or --kv-memory"
    return None


def _memory_elsewhere() -> tuple[int, int]:
    import psutil

    state = psutil.virtual_memory()
    return state.available, state.total


def cpu_name() -> str:
    """The processor's name as it tells it."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    import platform

    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Instruction set extensions that the kernel reports (empty where it reports none)."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):  # x86, and Arm
            return set(line.split(":", 1)[1].split())
    return set()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
