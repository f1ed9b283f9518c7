"""Experts by all-to-all: each row goes to the ranks that have one of its experts, and their products come back.

As DeepEP's normal mode: how many rows go where is said first, then the rows, with which experts they have and with what
weight; what each rank's experts make of a row comes back as one sum, and these are added in the order of ranks.

Legend: T tokens of this rank, R rows that it is given, N width of what experts read and give, k experts of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.layers.weight import Layer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.distributed.comm import Comm
    from phloem.layers.moe import SparseMLP
    from phloem.layers.norm import AnyNorm
    from phloem.layers.rows import Rows


class Dispatched(Layer):
    """A sparse block whose experts lie whole on different ranks, each of which has rows of its own."""

    def __init__(self, rows: Rows, sparse: SparseMLP) -> None:
        self.rows, self.sparse = rows, sparse

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `SparseMLP`."""
        del add
        x_TN, total_TN = (x_TN, x_TN) if norm is None else norm.add(x_TN, residual_TN)
        return self.start(x_TN)(), total_TN

    def start(self, x_TN: Tensor, /) -> Callable[[], Tensor]:
        """As `SparseMLP`. All ranks together, those without rows too."""
        sparse, comm = self.sparse, self.rows.comm
        read_TN, ids_Tk, weights_Tk = sparse.rows_for(x_TN)
        if comm is None:
            return lambda: x_TN
        each = sparse.config.count // comm.size
        # Those that give back what they read have no rank: the first has them.
        owner_Tk = torch.where(ids_Tk < sparse.config.count, ids_Tk.long() // each, 0)
        going = [(owner_Tk == rank).any(1).nonzero().view(-1) for rank in range(comm.size)]
        given, ids, weights = (_sent(comm, x, going) for x in (read_TN, ids_Tk, weights_Tk))

        def end() -> Tensor:
            made = sparse.own_part(torch.cat(given), torch.cat(ids), torch.cat(weights))
            back = comm.all_to_all([part.float() for part in made.split([len(part) for part in given])])
            out_TN = torch.zeros(read_TN.shape, dtype=torch.float32, device=read_TN.device)
            for at, part in zip(going, back, strict=True):
                out_TN.index_add_(0, at, part)
            return sparse.widened(out_TN.to(read_TN.dtype))

        return end


def _sent(comm: Comm, x: Tensor, going: list[Tensor]) -> list[Tensor]:
    return comm.all_to_all([x[at] for at in going])
