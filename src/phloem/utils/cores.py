"""How many compute threads this process may have: affinity, one per physical core, and the cgroup's CPU quota."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cores() -> int:
    """At least 1. Hyperthreads of one core count once: two share its vector units."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in cpus}
    quota = cgroup_quota()
    return max(1, len(cores) if quota is None else min(len(cores), math.ceil(quota)))


def _siblings(cpu: int) -> str:
    return _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu)


def cgroup_quota(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs that the cgroup (version 2 or 1) or any of its parents allows, or None where nothing limits them."""
    limits: list[float] = []
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, read = root, _quota_v2
        elif "cpu" in controllers.split(","):
            base, read = root / "cpu", _quota_v1
        else:
            continue
        place = base / path.lstrip("/")
        for folder in (place, *place.parents):
            limit = read(folder)
            if limit is not None:
                limits.append(limit)
            if folder == base:
                break
    return min(limits, default=None)


def _quota_v2(folder: Path) -> float | None:
    fields = (_read(folder / "cpu.max") or "").split()
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0] != "max" else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
