"""All ranks' shares of a model as one, called on every rank together: its stages' layers one after another, its head.

Legend: T tokens, L rows of hidden states, N hidden size, V vocabulary.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Literal

import torch

from phloem.core.errors import ConfigError
from phloem.distributed.groups import give, take
from phloem.engine.ranks.leaving import Links, undoing_of
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
        self._links, self._later = Links(groups), False
        self.undoing = self._undoing()  # how all ranks leave a step for which one has no memory; None: that cannot be
        if groups.up is not None and self._stage is None and groups.before is None:
            raise ConfigError("pp_size: this model's layers are not shared out", param="pp_size")

    def forward(self, step: ForwardBatch) -> Tensor:
        """Hidden states [L, N] on rank 0; on others something as wide."""
        if self._stage is None:
            return self.model.forward(step)
        assert isinstance(self.model, Decoder)
        groups, rows, index = self._groups, self.rows, step.logit_index
        wanted = (index is None or len(index) > 0) if rows is None else rows.wanted > 0
        given = self._links.take()
        begun = perf_counter()
        made = run_stage(self.model, self._stage, step, given)
        self.busy += perf_counter() - begun
        if groups.after is None and wanted:
            made = self._ended(made[0])
        if groups.after is not None or wanted or rows is None:
            self._links.give(made)
        if groups.up is None or not groups.up.rank:
            return made[0] if made else given[0][:0]
        if self._later or not (wanted or rows is None):
            # The stages behind go on with it while this one begins the next.
            return made[0][:0]
        # Of what nothing is wanted it comes that all stages have done it.
        return (self._links.hear() or [made[0][:0]])[0]

    def _ended(self, hidden_LN: Tensor) -> list[Tensor]:
        """What the last stage gives: hidden states of all groups, and what the head makes of them."""
        made = [hidden_LN if self.rows is None else self.rows.gather(hidden_LN)]
        if self.head:
            of, begun = self.model.head if self.head == "logits" else self.model.greedy, perf_counter()
            made.append(of(made[0]))
            self.busy += perf_counter() - begun
        return made

    def _undoing(self) -> Undoing | None:
        if self._stage is None:
            return undoing_of([self._groups.tp, self._groups.attn])
        return undoing_of([self._groups.tp]) if self.rows is None else None

    def begin(self, head: Kind | Literal[""], *, later: bool = False) -> None:
        """A step was told. `later`: on rank 0, what comes of it is `taken`, and not waited for in `forward`."""
        self.head, self._later = head, later
        self._links.begin(hears=not later)

    def leave(self) -> None:
        """Where steps can be undone: this one never happened, and all ranks shall know."""
        if self.undoing is not None:
            self.undoing.undo()
            self._links.leave()

    @property
    def rank(self) -> int:
        """In the world."""
        return self._groups.rank

    @property
    def staged(self) -> bool:
        """Whether layers lie on several stages."""
        return self._stage is not None

    @property
    def comm(self) -> Comm | None:
        """By what the ranks meet in each layer, where they meet nowhere else in a forward pass."""
        return self._groups.tp if self._stage is None and self.rows is None else None

    @property
    def entrance(self) -> Comm | None:
        """The ranks that embed tokens, where there are several and this is one of them, and all have the same rows."""
        stage = self._stage
        return self._groups.tp if self.rows is None and (stage is None or stage.axis.rank == 0) else None

    @property
    def ahead(self) -> int:
        """Steps that other stages may still have while rank 0 begins one."""
        staged = self._stage is not None and self.rows is None
        return self._stage.axis.size - 1 if staged and self._stage is not None else 0

    def taken(self) -> tuple[Tensor, Tensor]:
        """On rank 0: hidden states [L, N], and what the head made of them, of the oldest step that was begun for later
        and has not been taken; empty ones where nothing is wanted. Waits for it. Raises StepUndone."""
        found = self._links.hear()
        return (found[0], found[1]) if found else (torch.empty(0, self.model.hidden_size), torch.empty(0))

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
            return self._links.hear()[0]
        self._links.answers()
        found = of(take(groups.down)[0])
        self._links.give([found])
        return found

    def unchosen(self) -> None:
        """Instead of `chosen` on a rank that has left the step."""
        if self._groups.down is not None and self._groups.down.rank:
            take(self._groups.down)
