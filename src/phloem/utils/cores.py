"""How many compute threads this process may have: affinity, one per physical core, and the cgroup's CPU quota."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path


def available_cores() -> int:
    """At least 1. Hyperthreads of one core count once: two share its vector units."""
    cores, quota = core_groups(), cgroup_quota()
    return max(1, len(cores) if quota is None else min(len(cores), math.ceil(quota)))


def core_groups() -> list[set[int]]:
    """The CPUs that this process may use, those of one physical core together."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    groups: dict[str, set[int]] = {}
    for cpu in cpus:
        groups.setdefault(_siblings(cpu), set()).add(cpu)
    return list(groups.values())


def bind_threads(threads: Sequence[int]) -> bool:
    """Give each of these threads (0: the calling one) a core of its own; False, and nothing done, where that is not so.

    Only a team that has every core of the process is bound. A smaller one finds free cores by itself, and bound to the
    first ones it would meet whoever else was bound to them.
    """
    groups = core_groups()
    if len(groups) != len(threads) or len(threads) < 2 or not hasattr(os, "sched_setaffinity"):
        return False
    try:
        for thread, cpus in zip(threads, groups, strict=True):
            os.sched_setaffinity(thread, cpus)
    except OSError:  # not allowed here: threads that float are slower, not wrong
        return False
    return True


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
