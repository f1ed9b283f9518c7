"""What this process may use of the machine: cores and memory, limits of its control group included."""

from __future__ import annotations

from pathlib import Path

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
    return free, total


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
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
