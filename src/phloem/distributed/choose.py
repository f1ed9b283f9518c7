"""By what the ranks of one machine meet, and why."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING, Literal

from phloem.core.errors import ConfigError
from phloem.distributed.comm import Gloo
from phloem.distributed.nccl import Nccl
from phloem.distributed.shm import SharedMemory

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.distributed.comm import Comm

Kind = Literal["auto", "shm", "gloo", "nccl"]


def choose(
    asked: Kind, machine: str = platform.machine(), system: str = sys.platform, *, meets: str = ""
) -> tuple[str, str]:
    """(shm, gloo or nccl, the reason). `meets`: by what ranks with such a device each meet (`StepFacts`).

    Raises:
        ConfigError: one that cannot be here.
    """
    if meets:
        if asked not in ("auto", meets):
            why = f"{asked} adds in the host's memory, and ranks with a graphics card each meet by {meets}"
            raise ConfigError(f"tp_comm: {why}: leave it out", param="tp_comm")
        why = "calls on the cards' own streams, which step graphs hold" if asked == "auto" else "as asked"
        return meets, why
    if asked == Nccl.name:
        why = f"{asked} is for ranks with a graphics card each, and these run on processors"
        raise ConfigError(f"tp_comm: {why}: choose shm or gloo", param="tp_comm")
    ordered = machine.lower() in ("x86_64", "amd64") and system == "linux"
    if asked == "shm" and not ordered:
        raise ConfigError(f"tp_comm: shm needs Linux on x86-64, not {system} on {machine}", param="tp_comm")
    if asked != "auto":
        return asked, "as asked"
    return ("shm", "memory that they share") if ordered else ("gloo", f"{system} on {machine} may reorder writes")


def on_host(name: str) -> str:
    """By what ranks that meet so tell each other what their hosts have."""
    return choose("auto")[0] if name == Nccl.name else name


def connect(name: str, rank: int, size: int, place: Path, timeout: float) -> Comm:
    """One rank's end of a group of processes that meet in memory of the host; all of them call this with the same
    `place`."""
    return (SharedMemory if name == "shm" else Gloo)(rank, size, place, timeout)
