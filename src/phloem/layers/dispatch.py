"""A sparse block whose experts are reached by all-to-all (`distributed.exchange`).

Legend: T tokens of this rank, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.distributed.exchange import Routed
from phloem.layers.weight import Layer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

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
        sparse, exchange = self.sparse, self.rows.exchange
        if exchange is None:
            return lambda: x_TN
        read_TN, ids_Tk, weights_Tk = sparse.rows_for(x_TN)
        count = sparse.config.count
        there_Tk = torch.where(ids_Tk < count, ids_Tk, -1) if sparse.config.identities else ids_Tk
        routed = Routed(read_TN, there_Tk, weights_Tk, count, self.rows.most)
        coming = exchange.start(routed, sparse.own_part, weighted=not sparse.spec.scale_input)
        # Those that give back what they read are on no rank.
        return lambda: sparse.widened(sparse.with_identities(coming(), read_TN, ids_Tk, weights_Tk))
