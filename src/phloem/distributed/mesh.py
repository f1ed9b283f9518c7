"""The ranks of one model as axes: each layer is told which share of its weights is its own.

World = pp * dp * cp * tp ranks, tp innermost. Experts lie over the dp * cp * tp ranks of a stage: `ep` of them hold
different experts, and each expert's inner size is cut over the `expert_tp` ranks that hold the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Axis:
    """`size` ranks that share something out, of which this is number `rank`."""

    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} of {self.size} ranks does not exist")

    def span(self, size: int) -> tuple[int, int]:
        """[first, last) of `size` things that this rank holds; shares are equal but for the last ones."""
        share = -(-size // self.size)
        return min(size, share * self.rank), min(size, share * (self.rank + 1))


ONE = Axis()


@dataclass(frozen=True, slots=True)
class Mesh:
    """One rank's place on every axis: data, pipeline, context, tensor and expert parallel. The default is one rank."""

    dp: Axis = ONE
    pp: Axis = ONE
    cp: Axis = ONE
    tp: Axis = ONE
    ep: Axis = ONE
    expert_tp: Axis = ONE

    @staticmethod
    def of(rank: int = 0, *, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1, ep: int = 1) -> Mesh:
        """The place of a rank in a world of pp * dp * cp * tp.

        Raises:
            ConfigError: for a rank outside the world, or an `ep` that does not divide the ranks of a stage.
        """
        inner = dp * cp * tp
        if min(pp, dp, cp, tp, ep) < 1 or not 0 <= rank < pp * inner:
            raise ConfigError(f"rank {rank} is outside a world of {pp} x {dp} x {cp} x {tp} ranks")
        if inner % ep:
            raise ConfigError(f"ep_size {ep} does not divide {inner} ranks; valid: {some_sizes(inner, inner)}")
        stage, place = divmod(rank, inner)
        expert_tp = inner // ep
        return Mesh(
            dp=Axis(dp, place // (cp * tp)),
            pp=Axis(pp, stage),
            cp=Axis(cp, place // tp % cp),
            tp=Axis(tp, place % tp),
            ep=Axis(ep, place // expert_tp),
            expert_tp=Axis(expert_tp, place % expert_tp),
        )

    def whole(self) -> Mesh:
        """The same place where all ranks of a stage are those of `tp`."""
        place = (self.dp.rank * self.cp.size + self.cp.rank) * self.tp.size + self.tp.rank
        return replace(self, dp=ONE, cp=ONE, tp=Axis(self.dp.size * self.cp.size * self.tp.size, place))

    @property
    def size(self) -> int:
        """Ranks in the world."""
        return self.pp.size * self.dp.size * self.cp.size * self.tp.size


def some_sizes(limit: int, count: int, fits: Callable[[int], bool] | None = None) -> str:
    """The sizes up to `limit` that divide `count` (or that `fits` takes), for a message."""
    takes = fits or (lambda size: count % size == 0)
    return ", ".join(str(size) for size in range(1, limit + 1) if takes(size))
