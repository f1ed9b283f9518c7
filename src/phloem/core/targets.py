"""What requests are promised: how soon their first token comes, and how far apart the others may be.

A request says so itself, or its class does (`service_tier`), or the server's usual targets hold.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from phloem.core.errors import ConfigError

Fair = Literal["none", "key", "user"]
NAMES = ("ttft_ms", "itl_ms")
MOST_MS = 86_400_000.0  # a day


class Target(NamedTuple):
    """Seconds to the first token, and between two later ones; 0: as they come."""

    ttft: float = 0.0
    itl: float = 0.0


@dataclass(frozen=True)
class Targets:
    """`usual` of every request, and instead of it those of the classes that have their own."""

    usual: Target = Target()
    tiers: dict[str, Target] = field(default_factory=dict[str, Target])

    @property
    def any_itl(self) -> bool:
        return any(target.itl for target in (self.usual, *self.tiers.values()))

    def of(self, tier: str, ttft: float, itl: float) -> Target:
        """Of a request of this class that asks for these seconds; 0: it leaves that to its class."""
        found = self.tiers.get(tier, self.usual)
        return Target(ttft or found.ttft, itl or found.itl)

    @staticmethod
    def parse(text: str | None) -> Targets:
        """`{"ttft_ms": 500, "itl_ms": 50, "tiers": {"flex": {"ttft_ms": 60000}}}`. Raises ConfigError."""
        if text is None:
            return Targets()
        try:
            found: Any = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"slo: {error}; expected JSON such as {_EXAMPLE}", param="slo") from None
        if not isinstance(found, dict):
            raise ConfigError(f"slo: expected an object such as {_EXAMPLE}", param="slo")
        tiers: Any = found.pop("tiers", {})
        if not isinstance(tiers, dict) or not all(isinstance(one, dict) for one in tiers.values()):
            raise ConfigError('slo: tiers: expected an object such as {"flex": {"ttft_ms": 60000}}', param="slo")
        return Targets(_target(found, ""), {str(name): _target(one, f"tiers.{name}.") for name, one in tiers.items()})


_EXAMPLE = '{"ttft_ms": 500, "itl_ms": 50, "tiers": {"flex": {"ttft_ms": 60000}}}'


def _target(said: dict[str, Any], where: str) -> Target:
    for name, value in said.items():
        if name not in NAMES:
            raise ConfigError(f"slo: unknown {where}{name!s:.100}; known: {', '.join(NAMES)}, tiers", param="slo")
        if isinstance(value, bool) or not isinstance(value, int | float) or not in_range(value):
            raise ConfigError(f"slo: {where}{name}: {value!r:.100} is not above 0 ms and at most a day", param="slo")
    return Target(*(said.get(name, 0.0) / 1000 for name in NAMES))


def in_range(milliseconds: float) -> bool:
    return math.isfinite(milliseconds) and 0 < milliseconds <= MOST_MS
