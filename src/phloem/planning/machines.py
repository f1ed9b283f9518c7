"""Devices by name, with their makers' figures: memory, bandwidth, arithmetic, links. All of them dense, none sparse."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from phloem.core.errors import ConfigError

GIB = float(2**30)
Kind = str  # of a product's inputs: "bf16", "fp8" or "fp4"
KINDS = ("fp4", "fp8", "bf16")
LEAST, MOST = 1e-3, 1e9  # of any figure: beyond, times are 0 or infinite


@dataclass(frozen=True)
class Machine:
    """One device and the links around it. A rate of 0: it has no such units."""

    name: str
    memory_gib: float
    bandwidth: float  # GB/s
    bf16: float  # TFLOPS
    fp8: float
    fp4: float
    link: float  # GB/s in each direction, between devices of one domain
    domain: int  # devices that such links join
    net: float  # GB/s of each device to devices of other domains

    def rate(self, kind: Kind) -> float:
        """FLOPS of products of such inputs; without units for them they are widened."""
        for known in KINDS[KINDS.index(kind) :]:
            found = {"fp4": self.fp4, "fp8": self.fp8, "bf16": self.bf16}[known]
            if found:
                return found * 1e12
        raise AssertionError(f"{self.name} has no bf16 rate")


def _known(*rows: Machine) -> dict[str, Machine]:
    return {row.name: row for row in rows}


MACHINES = _known(
    Machine("a10g", 22, 600, 70, 0, 0, 16, 8, 12),
    Machine("a100", 79, 2039, 312, 0, 0, 300, 8, 25),
    Machine("a100-40", 39, 1555, 312, 0, 0, 300, 8, 25),
    Machine("l40s", 44, 864, 362, 733, 0, 32, 8, 25),
    Machine("h20", 95, 4000, 148, 296, 0, 450, 8, 50),
    Machine("h800", 79, 3350, 989, 1979, 0, 200, 8, 50),
    Machine("h100", 79, 3350, 989, 1979, 0, 450, 8, 50),
    Machine("h200", 140, 4800, 989, 1979, 0, 450, 8, 50),
    Machine("b200", 179, 8000, 2250, 4500, 9000, 900, 8, 50),
    Machine("gb200", 185, 8000, 2500, 5000, 10000, 900, 72, 50),
    Machine("gb300", 278, 8000, 2500, 5000, 15000, 900, 72, 100),
    Machine("mi300x", 191, 5300, 1307, 2615, 0, 448, 8, 50),
    Machine("mi355x", 287, 8000, 2500, 5000, 10000, 537, 8, 50),
)


def machine(name: str, **own: float | None) -> Machine:
    """A known device, or `custom`; `own`: fields that differ from it.

    Raises:
        ConfigError: an unknown name, a figure that no device has, or a custom device without what is needed.
    """
    given = {key: value for key, value in own.items() if value is not None}
    for key, value in given.items():
        if not LEAST <= value <= MOST:
            raise ConfigError(f"{key}: {value:g} must be above 0, from {LEAST:g} to {MOST:g}", param=key)
    if name == "custom":
        needed = [key for key in ("memory_gib", "bandwidth", "bf16") if key not in given]
        if needed:
            raise ConfigError(f"gpu custom: {', '.join(needed)} must be given", param=needed[0])
        base = Machine("custom", 0, 0, 0, 0, 0, link=25, domain=8, net=12.5)
    elif name.lower() in MACHINES:
        base = MACHINES[name.lower()]
    else:
        near = difflib.get_close_matches(name.lower(), MACHINES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"gpu {name!r:.80} is not known{hint}; known: {', '.join(MACHINES)}, custom", param="gpu")
    if "domain" in given:
        given["domain"] = int(given["domain"])
    return replace(base, **given)  # pyright: ignore[reportArgumentType]
