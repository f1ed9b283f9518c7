"""Dummy steps of all ranks together, where these have a device each: what loads kernels, and what is measured.

No rank is told of them one by one: all run the same shapes in the same order, and meet within them.

Legend: L rows of hidden states, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.engine.forward import run_forward
from phloem.engine.ranks.contexts import run_rows

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.core.batch import Batch
    from phloem.core.memory import MemorySpec
    from phloem.engine.inputs import StepInputs
    from phloem.engine.ranks.stages import Kind, Together
    from phloem.engine.transfer import LastTokens
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec


class Rehearsed:
    """All ranks' shares of a model, called on every rank together (`sizing.Rehearsing`)."""

    def __init__(self, whole: Together, *, together: bool = True) -> None:
        """`together`: there are others, who run the same steps and no more; otherwise this rank is by itself
        (`engine.warmup.alone`)."""
        self._whole, model, self.together = whole, whole.model, together
        self.attention_specs: list[AttentionSpec] = model.attention_specs
        self.memory: list[MemorySpec] = model.memory
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size
        self.leads = whole.rank == 0  # only its logits are whole, and are chosen from

    def run(
        self, backend: AttentionBackend, pool: KVPool, batch: Batch, inputs: StepInputs, last: LastTokens
    ) -> Tensor:
        """Hidden states [L, N] of the rows' last tokens, on rank 0."""
        self._whole.begin("")
        rows = self._whole.rows
        if rows is None:
            return run_forward(self._whole, backend, pool, inputs, inputs.logit_index)
        return run_rows(self._whole, rows, backend, pool, batch, last)

    def head(self, hidden_LN: Tensor, /) -> Tensor:
        return self._of(hidden_LN, "logits")

    def greedy(self, hidden_LN: Tensor, /) -> Tensor:
        return self._of(hidden_LN, "greedy")

    def _of(self, hidden_LN: Tensor, kind: Kind) -> Tensor:
        return self._whole.chosen(hidden_LN.contiguous(), kind)
