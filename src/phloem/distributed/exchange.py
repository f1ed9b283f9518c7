"""Experts by all-to-all: each row goes to the ranks that have one of its experts, and their products come back as sums.

Legend: T tokens of this rank, R rows that it is given, N width of what experts read and give, k experts of a token,
E experts of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.distributed.comm import Comm

# (x [R, N], ids [R, k], weights [R, k]) -> [R, N]: what this rank's experts make of rows, a weighted sum for each of
# them. Ids are of all ranks' experts; those of others, and -1, give nothing.
Make = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class Routed:
    """This rank's rows and which experts they have. `most`: rows of the rank that has the most; None: unknown."""

    x_TN: Tensor
    ids_Tk: Tensor  # below `experts`, or -1: nobody's
    weights_Tk: Tensor
    experts: int
    most: int | None = None


class Exchange(Protocol):
    """A way for rows and sums between ranks, each of which has as many experts, in their order."""

    def start(self, routed: Routed, make: Make, /, *, weighted: bool = True) -> Callable[[], Tensor]:
        """Send rows; what is given ends it, with [T, N]. All ranks together, those without rows too, both times.

        `weighted`: an expert's weight multiplies what it gives, so that it may be applied elsewhere than at the expert.
        """
        ...


class Ragged:
    """As DeepEP's normal mode, by the collectives of the group: how many rows go where is said first, then the rows,
    with which experts they have and with what weight. Sums are added in float32 and in the order of ranks."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def start(self, routed: Routed, make: Make, /, *, weighted: bool = True) -> Callable[[], Tensor]:
        """As `Exchange`."""
        del weighted
        comm, x_TN = self._comm, routed.x_TN
        each = routed.experts // comm.size
        owner_Tk = torch.where(routed.ids_Tk >= 0, routed.ids_Tk.long() // each, -1)
        going = [(owner_Tk == rank).any(1).nonzero().view(-1) for rank in range(comm.size)]
        sent = (x_TN, routed.ids_Tk, routed.weights_Tk)
        given, ids, weights = (comm.all_to_all([x[at] for at in going]) for x in sent)

        def end() -> Tensor:
            made = make(torch.cat(given), torch.cat(ids), torch.cat(weights))
            back = comm.all_to_all([part.float() for part in made.split([len(part) for part in given])])
            out_TN = torch.zeros(x_TN.shape, dtype=torch.float32, device=x_TN.device)
            for at, part in zip(going, back, strict=True):
                out_TN.index_add_(0, at, part)
            return out_TN.to(x_TN.dtype)

        return end
