"""Data parallelism of attention: each group of ranks attends to rows of its own, and all compute the others' layers.

Before a feed-forward block the rows of all groups are gathered, behind it each rank goes on with its own. Which rows
those are is said before each step. A group may have none: its ranks then take part in what all compute, and that is
all they do.

Legend: T tokens of this rank's group, A tokens of all groups, L rows that are wanted, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.distributed.comm import Comm
    from phloem.distributed.mesh import Axis


class Rows:
    """How many rows of a step each group has. One for a rank's model; `begin` before each of its steps.

    Args:
        comm: all ranks of the stage, group by group; None: nothing is computed.
        dp: the groups, and that of this rank.
        dispatch: rows go to the ranks that have their experts, and to no others; each group is one rank then.
    """

    def __init__(self, comm: Comm | None, dp: Axis, dispatch: bool = False) -> None:
        self.comm, self.dp, self.dispatch = comm, dp, dispatch
        self._each = 1 if comm is None else comm.size // dp.size  # ranks of a group
        self.begun = False  # before the first step all ranks compute the same rows
        self._tokens = self._wanted = self._now = [0] * dp.size

    def begin(self, tokens: Sequence[int], wanted: Sequence[int]) -> None:
        """A step: tokens of each group, and rows of each whose next token is wanted."""
        self._tokens, self._wanted = list(tokens), list(wanted)
        self._now, self.begun = self._tokens, True

    def narrow(self) -> None:
        """From here on the wanted rows alone are computed."""
        self._now = self._wanted

    def gather(self, x: Tensor) -> Tensor:
        """[T, ...] of each group -> [A, ...], group by group. All ranks together."""
        counts, most = self._now, max(self._now)
        if len(x) != counts[self.dp.rank]:
            raise ValueError(f"{len(x)} rows, where this rank's group has {counts[self.dp.rank]}")
        if not most or self.comm is None:
            return x
        if len(x) < most:
            x = torch.cat((x, x.new_zeros((most - len(x), *x.shape[1:]))))
        firsts = self.comm.all_gather(x)[:: self._each]
        return torch.cat([part[:count] for part, count in zip(firsts, counts, strict=True)])

    def own(self, x: Tensor) -> Tensor:
        """[A, ...] -> [T, ...]: the rows of this rank's group."""
        first = sum(self._now[: self.dp.rank])
        return x[first : first + self._now[self.dp.rank]]
