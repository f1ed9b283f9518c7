"""By what the ranks of one machine meet, and why."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING, Literal

from phloem.core.errors import ConfigError
from phloem.distributed.comm import Gloo
from phloem.distributed.shm import SharedMemory

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.distributed.comm import Comm

Kind = Literal["auto", "shm", "gloo"]


def choose(asked: Kind, machine: str = platform.machine(), system: str = sys.platform) -> tuple[str, str]:
    """(shm or gloo, the reason). Raises ConfigError for one that cannot be here."""
    ordered = machine.lower() in ("x86_64", "amd64") and system == "linux"
    if asked == "shm" and not ordered:
        raise ConfigError(f"tp_comm: shm needs Linux on x86-64, not {system} on {machine}", param="tp_comm")
    if asked != "auto":
        return asked, "as asked"
    return ("shm", "memory that they share") if ordered else ("gloo", f"{system} on {machine} may reorder writes")


def connect(name: str, rank: int, size: int, place: Path, timeout: float) -> Comm:
    """One rank's end of a group of processes; all of them call this with the same `place`."""
    return (SharedMemory if name == "shm" else Gloo)(rank, size, place, timeout)
