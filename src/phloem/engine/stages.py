"""All ranks' shares of a model as one, called on every rank together: its stages' layers one after another, its head.

Legend: T tokens, L rows of hidden states, N hidden size, V vocabulary.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Literal

from phloem.core.errors import ConfigError
from phloem.distributed.groups import give, take
from phloem.models._common import Decoder
from phloem.models._stage import run_stage

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.distributed.comm import Comm, Undoing
    from phloem.distributed.groups import Groups
    from phloem.layers.context import ForwardBatch
    from phloem.models import Model
    from phloem.models._stage import Stage

Kind = Literal["logits", "greedy"]


class Together:
    """A rank's share, and its groups.

    Chunks of prompts follow each other through the stages of a pipeline. So do batches that give tokens where `head`
    says what is made of their states: the last stage makes it at once, and what it gives is taken later (`taken`).
    """

    def __init__(self, model: Model, groups: Groups) -> None:
        self.model, self._groups = model, groups
        self.rows = model.rows if isinstance(model, Decoder) else None  # where groups of ranks attend to their own
        self.head: Kind | Literal[""] = ""  # of the step that runs
        self.found: dict[Kind, Tensor] = {}  # of rank 0, what `chosen` would give for the step whose tokens are chosen
        self.busy = 0.0  # seconds in which this stage has computed
        self._stage: Stage | None = model.stage if isinstance(model, Decoder) else None
        if groups.up is not None and self._stage is None and groups.before is None:
            raise ConfigError("pp_size: this model's layers are not shared out", param="pp_size")

    def forward(self, step: ForwardBatch) -> Tensor:
        """Hidden states [L, N] on rank 0; on others something as wide."""
        if self._stage is None:
            return self.model.forward(step)
        assert isinstance(self.model, Decoder)
        groups = self._groups
        given = [] if groups.before is None else take(groups.before)
        begun = perf_counter()
        made = run_stage(self.model, self._stage, step, given)
        self.busy += perf_counter() - begun
        if groups.after is not None:
            give(groups.after, made)
        rows, index = self.rows, step.logit_index
        if (index is not None and not len(index)) if rows is None else not rows.wanted:
            # A chunk of which nothing is wanted: the stages behind go on with it while this one begins the next.
            return made[0][:0]
        if rows is not None and groups.after is None:
            made = [rows.gather(made[0])]
        if self.head and groups.after is None:
            of, begun = self.model.head if self.head == "logits" else self.model.greedy, perf_counter()
            made = [made[0], of(made[0])]
            self.busy += perf_counter() - begun
        if groups.up is not None and groups.up.rank == 0:
            give(groups.up, made)
        elif groups.up is not None and not self.head:
            return take(groups.up)[0]
        return made[0]

    @property
    def rank(self) -> int:
        """In the world."""
        return self._groups.rank

    @property
    def comm(self) -> Comm | None:
        """By what the ranks meet in each layer, where they meet nowhere else in a forward pass."""
        return self._groups.tp if self._stage is None and self.rows is None else None

    @property
    def undoing(self) -> Undoing | None:
        """How all ranks leave a step for which one has no memory; None: that cannot be."""
        return None if self.comm is None else self.comm.undoing

    @property
    def ahead(self) -> int:
        """Steps that other stages may still have while rank 0 begins one."""
        staged = self._stage is not None and self.rows is None
        return self._stage.axis.size - 1 if staged and self._stage is not None else 0

    def taken(self) -> tuple[Tensor, Tensor]:
        """On rank 0: hidden states [L, N], and what the head made of them, of the oldest step with a `head` that has
        not been taken. Waits for it."""
        assert self._groups.up is not None
        hidden_LN, found = take(self._groups.up)
        return hidden_LN, found

    def headed(self, hidden_LN: Tensor, kind: Kind) -> Tensor:
        """As `chosen`, where every rank has the same states of the step that has just run: nothing is sent but what
        comes out."""
        return self.model.head(hidden_LN) if kind == "logits" else self.model.greedy(hidden_LN)

    def gathered(self, hidden_LN: Tensor, order_L: Tensor) -> Tensor:
        """As `attending.Shared`: on rank 0, and without stages on every rank."""
        if self.rows is not None and self._stage is None:
            return self.rows.gather(hidden_LN)[order_L]
        return hidden_LN[order_L] if self._groups.rank == 0 else hidden_LN

    def chosen(self, hidden_LN: Tensor, kind: Kind) -> Tensor:
        """Logits float32 [L, V], or the most likely tokens [L], on rank 0; of the others it does not matter.

        `hidden_LN`: rank 0's; the others bring a tensor as large and of its type, which may be overwritten.
        """
        groups, of = self._groups, self.model.head if kind == "logits" else self.model.greedy
        if self._stage is None:
            assert groups.tp is not None
            return of(groups.tp.broadcast(hidden_LN.contiguous()))
        if groups.down is None:
            return hidden_LN  # a stage that has neither the plan nor the head
        if groups.down.rank == 0:
            give(groups.down, [hidden_LN])
            assert groups.up is not None
            return take(groups.up)[0]
        found = of(take(groups.down)[0])
        if groups.up is not None:
            give(groups.up, [found])
        return found
