"""Decode steps by recorded graphs: the step's inputs are copied into a bucket's fixed ones, and the graph replayed.

The graph covers the forward pass up to the hidden states; the head and sampling, which depend on what the rows ask
for, run behind it.

Legend: R rows, B rows of the bucket, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.engine.forward import run_forward
from phloem.engine.inputs import FixedInputs
from phloem.engine.recorded.graphs import StepGraphs
from phloem.kernels.graph import check_replay

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.engine.inputs import Step
    from phloem.kernels.graph import GraphRecorder, StepGraph
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model
    from phloem.platforms._facts import StepFacts

PATIENCE_WITH_CHECK = 2  # whoever compares steps wants them recorded soon


class OnDemand(StepGraphs[FixedInputs, "Tensor"]):
    """Records a size only when a step has asked for it, and nothing before."""

    def _left(self) -> list[int]:
        return [size for size in super()._left() if self._wanted[size]]


class DecodeGraphs:
    """Recorded decode steps of one runner, used by its thread alone (`recorded.choice.RecordedWay`).

    `limit`: most rows; `max_pages`: most pages of a row; `check`: compare each with an eager step; `budget`: bytes that
    they may take; `shared`: they are of steps whose rows share pages, and are recorded only once such steps came.
    """

    def __init__(
        self,
        recorder: GraphRecorder,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool,
        facts: StepFacts,
        limit: int,
        max_pages: int,
        check: bool = False,
        budget: int | None = None,
        shared: bool = False,
    ) -> None:
        self.decision = "shared_step_graphs" if shared else "step_graphs"
        self._shared = shared
        self._recorder, self._model, self._backend, self._pool = recorder, model, backend, pool
        self._on_host = facts.on_host
        self._max_pages = max_pages
        self._check = check
        patience = PATIENCE_WITH_CHECK if check else facts.patience
        kind = OnDemand if shared else StepGraphs
        self.graphs: StepGraphs[FixedInputs, Tensor] = kind(limit, self._make, patience=patience, budget=budget)

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor | None:
        """Hidden states [R, N] of a decode step, valid until the next one; None: another way runs it."""
        batch = step.batch
        if not batch.is_decode or batch.prompt_targets or not step.recordable or step.pages > self._max_pages:
            return None
        if self._shared and not step.shared:
            return None
        found = self.graphs.get(batch.num_rows)
        if found is None:
            return None
        found.inputs.write(step.shared_arrays(found.size) if self._shared else step.arrays(found.size))
        ready()
        hidden_BN = found.replay()
        if self._check:
            check_replay(found.graph, [hidden_BN], lambda: [self._eager(found.inputs)])
        return hidden_BN[: batch.num_rows]

    def drop(self) -> None:
        self.graphs.drop()

    @property
    def nbytes(self) -> int:
        return self.graphs.nbytes

    def _eager(self, fixed: FixedInputs) -> Tensor:
        return run_forward(self._model, self._backend, self._pool, fixed.inputs, None)

    def _make(self, rows: int) -> tuple[FixedInputs, StepGraph, Tensor]:
        fixed = FixedInputs(self._pool, rows, rows, rows, self._max_pages, on_host=self._on_host, shared=self._shared)
        return fixed, *self._recorder.record(lambda: self._eager(fixed))
