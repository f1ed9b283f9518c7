"""Groups of ranks that attend to rows of their own, while all compute the layers that do not attend.

Before a feed-forward block the rows of all groups are gathered, behind it each rank goes on with its own. Which rows
those are is said before each step. They are of different requests (data parallelism of attention), and a group may have
none: its ranks then take part in what all compute, and that is all they do. Or they are tokens of the same requests
(context parallelism), whose keys and values are gathered too.

Legend: T tokens of this rank's group, A tokens of all groups, L rows that are wanted, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.distributed.exchange import Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.distributed.comm import Comm
    from phloem.distributed.exchange import Exchange
    from phloem.distributed.mesh import Axis


class Rows:
    """How many rows of a step each group has. One for a rank's model; `begin` before each of its steps.

    Args:
        comm: all ranks of the stage, group by group; None: nothing is computed.
        dp: the groups, and that of this rank.
        dispatch: rows go to the ranks that have their experts, and to no others; each group is one rank then.
        exchange: by what they go; None: by collectives of `comm`.
        context: what is a row here is a token of a request, of which other groups have others.
    """

    def __init__(
        self,
        comm: Comm | None,
        dp: Axis,
        dispatch: bool = False,
        context: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        self.comm, self.dp, self.dispatch, self.context = comm, dp, dispatch, context
        self.exchange = exchange or (None if comm is None else Ragged(comm))
        self._each = 1 if comm is None else comm.size // dp.size  # ranks of a group
        self.begun = False  # before the first step all ranks compute the same rows
        self._tokens = self._wanted = self._now = [0] * dp.size
        self._adapters: tuple[Tensor, Tensor] | None = None
        self.adapters: Tensor | None = None  # int32 [A], 0: none, of the rows that are gathered now; None: no row's

    def begin(
        self, tokens: Sequence[int], wanted: Sequence[int], adapters: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """A step: tokens of each group, and rows of each whose next token is wanted; group by group the adapters of
        all of those, and of all of these (None: nobody has one)."""
        self._tokens, self._wanted = list(tokens), list(wanted)
        self._now, self.begun = self._tokens, True
        self._adapters, self.adapters = adapters, None if adapters is None else adapters[0]

    @property
    def option(self) -> str:
        """By which there are several groups."""
        return f"{'attn_cp_size' if self.context else 'attn_dp_size'} {self.dp.size}"

    @property
    def wanted(self) -> int:
        """Rows of all groups whose next token is wanted."""
        return sum(self._wanted)

    @property
    def most(self) -> int | None:
        """Rows of the group that has the most of this step's; None before the first step."""
        return max(self._now) if self.begun else None

    def narrow(self) -> None:
        """From here on the wanted rows alone are computed."""
        self._now = self._wanted
        self.adapters = None if self._adapters is None else self._adapters[1]

    def gather(self, x: Tensor) -> Tensor:
        """[T, ...] of each group -> [A, ...], group by group. All ranks together."""
        counts, most = self._now, max(self._now)
        if len(x) != counts[self.dp.rank]:
            raise ValueError(f"{len(x)} rows, where this rank's group has {counts[self.dp.rank]}")
        if not most or self.comm is None:
            return x
        if len(x) < most:
            x = torch.cat((x, x.new_zeros((most - len(x), *x.shape[1:]))))
        # Of each group the rank that has the same heads as this one.
        alike = self.comm.all_gather(x)[self.comm.rank % self._each :: self._each]
        return torch.cat([part[:count] for part, count in zip(alike, counts, strict=True)])

    def own(self, x: Tensor) -> Tensor:
        """[A, ...] -> [T, ...]: the rows of this rank's group."""
        first = sum(self._now[: self.dp.rank])
        return x[first : first + self._now[self.dp.rank]]
