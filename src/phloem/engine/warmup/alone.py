"""A rank's part of steps without the other ranks: which kernels it launches shows on tensors that have no data.

What the others would give has the shape that it would have. Legend: T tokens, L wanted positions, N hidden size, V
vocabulary, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from phloem.distributed import deepep
from phloem.distributed.groups import Groups
from phloem.distributed.mesh import Mesh
from phloem.engine.ranks.parallel import shared
from phloem.engine.ranks.stages import Together
from phloem.kernels.triton.ahead import Notes
from phloem.models._common import Decoder
from phloem.models._stage import run_stage

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.distributed.comm import Comm
    from phloem.distributed.exchange import Make, Routed
    from phloem.distributed.groups import Group
    from phloem.engine.ranks.stages import Kind
    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.models import Model
    from phloem.models._stage import Stage


@dataclass(frozen=True)
class Arrangement:
    """How many ranks a model has, by axis (`distributed.mesh`), and by what rows go to experts (`moe_a2a_backend`)."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    backend: str = "none"

    @property
    def stage(self) -> int:
        """Ranks of a stage."""
        return self.dp * self.cp * self.tp

    @property
    def size(self) -> int:
        return self.pp * self.stage

    def mesh(self, rank: int) -> Mesh:
        """Raises ConfigError where these go into no world."""
        return Mesh.of(rank, pp=self.pp, dp=self.dp, cp=self.cp, tp=self.tp, ep=self.ep)


class Absent:
    """A group of which this rank alone is there (`distributed.comm.Comm`), for tensors without data."""

    name = "absent"
    records = True
    undoing = None

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("meta")

    @property
    def host(self) -> Comm:
        return self

    def check(self) -> None: ...

    def abort(self) -> None: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def broadcast(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return list(x.new_empty((self.size, *x.shape)).unbind(0))

    def gather(self, x: Tensor) -> list[Tensor] | None:
        return self.all_gather(x) if self.rank == 0 else None

    def all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        return list(parts)


class Sent:
    """Rows on their way to the ranks of their experts (`distributed.exchange.Exchange`). How many come is not known: so
    many as go, and as many from each rank, are the least and the most."""

    def __init__(self, ranks: int, backend: str) -> None:
        self._ranks, self._few = ranks, deepep.FEW if backend == deepep.NAMES[1] else 0

    def start(self, routed: Routed, make: Make, /, *, weighted: bool = True) -> Callable[[], Tensor]:
        """As `Exchange`."""
        x_TN, k = routed.x_TN, routed.ids_Tk.shape[1]
        low = weighted and routed.most is not None and routed.most <= self._few
        for count in (len(x_TN), len(x_TN) * self._ranks):
            for choices in {k, 1} if low else {k}:  # experts of which each has its own rows
                given = (x_TN, x_TN.shape[1]), (routed.ids_Tk, choices), (routed.weights_Tk, choices)
                make(*(like.new_empty((count, width)) for like, width in given))
        return lambda: torch.empty_like(x_TN)


class Alone(Together):
    """A rank's share of a model, called on that rank alone (`stages.Together`)."""

    def __init__(self, model: Model, groups: Groups, dtype: torch.dtype) -> None:
        """`dtype`: in which the model computes."""
        super().__init__(model, groups)
        self._dtype = dtype

    def forward(self, step: ForwardBatch) -> Tensor:
        """As of all ranks together; on others than rank 0 as many rows as are wanted."""
        stage, model, rows = self._stage, self.model, self.rows
        if stage is None:
            return model.forward(step)
        assert isinstance(model, Decoder)
        made = run_stage(model, stage, step, self._given(model, stage, step))
        if self._groups.after is None and made and rows is not None:
            rows.gather(made[0])
        tokens, index = step.positions.shape[-1], step.logit_index
        wanted = tokens if index is None else len(index)
        return self._like(wanted if rows is None else rows.wanted)

    def _like(self, count: int) -> Tensor:
        return torch.empty(count, self.model.hidden_size, dtype=self._dtype, device="meta")

    def _given(self, model: Decoder, stage: Stage, step: ForwardBatch) -> list[Tensor]:
        """What the stage before gives: with a residual where this one's layers leave one."""
        if not stage.first:
            return []
        x_TN = self._like(step.positions.shape[-1])
        with Notes().taken():
            layer = model.layers[stage.first]
            _, residual_TN = layer.feed(*layer.attend(x_TN.clone(), None, step))
        return [x_TN] if residual_TN is None else [x_TN, torch.empty_like(residual_TN)]

    def chosen(self, hidden_LN: Tensor, kind: Kind) -> Tensor:
        """As of all ranks together."""
        if self._stage is None or (self._groups.down is not None and self.rank):
            return self.model.head(hidden_LN) if kind == "logits" else self.model.greedy(hidden_LN)
        if kind == "logits":
            return torch.empty(len(hidden_LN), self.model.vocab_size, dtype=torch.float32, device="meta")
        return torch.empty(len(hidden_LN), dtype=torch.int64, device="meta")


def placed(ctx: BuildContext, arrangement: Arrangement, rank: int) -> tuple[BuildContext, Groups]:
    """What a rank's model is built of, and its groups, whose other ranks are absent."""
    made = arrangement
    groups = Groups.join(rank, made.pp, made.stage, _absent, made.dp * made.cp)
    mesh, backend = made.mesh(rank), "none" if made.backend == "none" else "torch"
    ctx = shared(ctx, mesh, groups, backend)
    if ctx.rows is not None:
        ctx.rows.exchange = Sent(made.stage, made.backend)
    return ctx, groups


def _absent(group: Group, place: int) -> Comm:
    return Absent(place, len(group.members))
