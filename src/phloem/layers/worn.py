"""What one adapter has of its own beside low-rank additions to linear layers: matrices of the vocabulary, rows of them,
additions to experts.

Layers wear it while that adapter's rows are computed, in a pass of their own, op by op. Other rows never see it.
Legend: T tokens, L rows that are wanted, N inputs, V rows of the base's vocabulary, W those of the adapter's (at least
V), r rank, k choices of a token, F inner size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from phloem.kernels.reference_models import activate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.kernels.ops import Ops
    from phloem.kernels.specs import ExpertSpec
    from phloem.layers.weight import Weight


@dataclass(slots=True)
class LowRank:
    """An addition to a matrix: up (down x). The scale is in `up`."""

    down: Tensor  # [r, N]
    up: Tensor  # [M, r]

    def of(self, x: Tensor) -> Tensor:
        """float32 [.., N] -> [.., M]."""
        return (x @ self.down.float().T) @ self.up.float().T

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


@dataclass(slots=True)
class TokenRows:
    """Rows that stand in place of those of some tokens."""

    ids: Tensor  # [n] int64
    rows: Tensor  # [n, N]
    places: Tensor  # [W] int64: which of `rows` a token has, -1: none

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.rows.nbytes + self.places.nbytes


@dataclass(slots=True)
class WornEmbedding:
    """An embedding as an adapter has it. `value`: a prepared matrix in place of the base's; `added`: down [r, W], whose
    columns are tokens, and up [N, r]."""

    rows: int  # W: tokens beyond the base's are known with this adapter alone
    value: Any = None
    tokens: TokenRows | None = None
    added: LowRank | None = None

    def __call__(self, ops: Ops, ids_T: Tensor, base: Any, scale: float) -> Tensor:
        """As `Embedding`, whose matrix is `base`."""
        x_TN = ops.embedding(ids_T, base if self.value is None else self.value, scale)
        if self.tokens is not None:
            places_T = self.tokens.places[ids_T]
            own_TN = self.tokens.rows[places_T.clamp_min(0)].float() * scale
            x_TN = torch.where(places_T.unsqueeze(1) < 0, x_TN, own_TN.to(x_TN.dtype))
        if self.added is not None:
            up_rN = self.added.up.float().T
            more_TN = _rows(ops, self.added.down[:, ids_T].float().T, lambda each: each @ up_rN)
            x_TN = (x_TN.float() + scale * more_TN).to(x_TN.dtype)
        return x_TN


@dataclass(slots=True)
class WornHead:
    """A head as an adapter has it: factor (x W^T + up (down x)) + shift, with its own rows in W."""

    rows: int  # W
    value: Any = None
    tokens: TokenRows | None = None
    added: LowRank | None = None
    factor: Tensor | None = None  # [W]
    shift: Tensor | None = None  # [W]

    def __call__(self, ops: Ops, hidden_LN: Tensor, base: Any, bias: Tensor | None) -> Tensor:
        """float32 logits [L, W], before scale and soft cap; `bias` is the base's."""
        own = base if self.value is None else self.value
        logits_LW = ops.linear(hidden_LN, own, None)[0].to(torch.float32, copy=True)
        wide_LN = hidden_LN.float()
        if self.tokens is not None:
            rows_Nn = self.tokens.rows.float().T
            logits_LW[:, self.tokens.ids] = _rows(ops, wide_LN, lambda each: each @ rows_Nn)
        if self.added is not None:
            logits_LW += _rows(ops, wide_LN, self.added.of)
        if bias is not None:
            logits_LW[:, : len(bias)] += bias.float()
        if self.factor is not None:
            logits_LW *= self.factor
        if self.shift is not None:
            logits_LW += self.shift
        return logits_LW


@dataclass(slots=True)
class WornExperts:
    """Additions to some matrices of some experts: expert -> which (0, 1 gate and up, or up alone; then down) -> it."""

    added: dict[int, dict[int, list[LowRank]]] = field(default_factory=dict)

    def add(self, expert: int, which: int, one: LowRank) -> None:
        self.added.setdefault(expert, {}).setdefault(which, []).append(one)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for parts in self.added.values() for found in parts.values() for one in found)

    def __call__(
        self, x_TN: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, spec: ExpertSpec, pair: tuple[Reader, Reader]
    ) -> Tensor:
        """float32 [T, N]: the weighted sum of these experts alone, one after another. `pair`: gate and up, and down."""
        gate_up, down = pair
        count = 2 if spec.gated else 1  # matrices before the inner activation
        total_TN = torch.zeros(x_TN.shape, dtype=torch.float32, device=x_TN.device)
        for expert in sorted(set(ids_Tk.unique().tolist()) & set(self.added)):
            token, choice = (ids_Tk == expert).nonzero(as_tuple=True)
            weight = weights_Tk[token, choice].float().unsqueeze(1)
            read = x_TN[token].float()
            read = read * weight if spec.scale_input else read
            matrices = [gate_up(expert * count + which, x_TN.device) for which in range(count)]
            made = partial(self._one, expert, [*matrices, down(expert, x_TN.device)], spec)
            part = _rows(gate_up.ops, read, made)
            total_TN.index_add_(0, token, part if spec.scale_input else part * weight)
        return total_TN

    def _one(self, expert: int, matrices: list[Tensor], spec: ExpertSpec, x: Tensor) -> Tensor:
        """What an expert gives; `matrices`: its own."""
        inner = [self._product(x, expert, which, matrix) for which, matrix in enumerate(matrices[:-1])]
        return self._product(activate(torch.cat(inner, -1), spec), expert, len(inner), matrices[-1])

    def _product(self, x: Tensor, expert: int, which: int, matrix: Tensor) -> Tensor:
        out = F.linear(x, matrix)
        for one in self.added[expert].get(which, ()):
            out = out + one.of(x)
        return out


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads a matrix of a stack of them; out of a packed one, dequantised."""

    ops: Ops
    weight: Weight

    def __call__(self, number: int, device: torch.device) -> Tensor:
        """float32 [rows, inputs] of one part."""
        rows, value = self.weight.rows(number), self.weight.value
        if isinstance(value, torch.Tensor):
            return value[rows].float()
        # Whatever a packed weight is, the table's `embedding` reads its rows.
        return self.ops.embedding(torch.arange(rows.start, rows.stop, device=device), value, 1.0).float()


def _rows(ops: Ops, x: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    """What is made of each row of x. A table that promises bits has each by itself: torch's products add in an order
    that depends on how many rows there are."""
    if ops.name != "invariant" or not len(x):
        return made(x)
    return torch.cat([made(row.clone(memory_format=torch.contiguous_format)) for row in x.split(1)])
