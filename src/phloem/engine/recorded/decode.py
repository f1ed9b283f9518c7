"""Decode steps by recorded graphs: the step's inputs are copied into a bucket's fixed ones, and the graph replayed.

The graph covers the forward pass up to the hidden states; the head and sampling, which depend on what the rows ask
for, run behind it.

Legend: R rows, B rows of the bucket, N hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.attention import begin
from phloem.engine.forward import run_forward
from phloem.engine.inputs import FixedInputs
from phloem.engine.recorded.graphs import RecordedStep, StepGraphs
from phloem.engine.recorded.looks import Looks, Watched
from phloem.kernels.graph import check_replay
from phloem.kvcache.routes import noting

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


def sharing_sizes(limit: int) -> list[int]:
    """Row counts of steps whose rows share pages: 4, then two to an octave, and `limit` itself. Such steps come with
    many rows, and their graphs stand beside those of other steps, so there are fewer of them."""
    sizes = [size for power in range(2, limit.bit_length()) for size in (1 << power, 3 << (power - 1))]
    return [*(size for size in sizes if size < limit), limit] if limit > 1 else []


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Makes the graphs; it does not know them, so that they go when the last one who does lets them go."""

    recorder: GraphRecorder
    model: Model
    backend: AttentionBackend
    pool: KVPool
    on_host: bool
    max_pages: int
    shared: bool = False
    looks: Looks | None = None  # None: nobody looks, as a recording takes less time than a step

    def eager(self, fixed: FixedInputs) -> Tensor:
        memory = None
        if self.looks is not None:
            memory = Watched(begin(self.backend, fixed.inputs.rows(), self.pool), self.looks)
        return run_forward(self.model, self.backend, self.pool, fixed.inputs, None, memory)

    def make(self, rows: int) -> tuple[FixedInputs, StepGraph, Tensor]:
        fixed = FixedInputs(self.pool, rows, rows, rows, self.max_pages, on_host=self.on_host, shared=self.shared)
        step = noting(self.pool.routes, fixed.routes.update, lambda: self.eager(fixed))
        return fixed, *self.recorder.record(step)


class DecodeGraphs:
    """Recorded decode steps of one runner, used by its thread alone (`recorded.choice.RecordedWay`).

    `limit`: most rows; `max_pages`: most pages of a row; `check`: compare each with an eager step; `budget`: bytes that
    they may take; `shared`: they are of steps whose rows share pages; `leaves`: a recording may be left for a step that
    waits, not where other ranks make it too.
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
        leaves: bool = True,
    ) -> None:
        self.decision = "shared_step_graphs" if shared else "step_graphs"
        self._shared = shared
        looks = Looks(leaves=leaves) if facts.records_idle else None
        self._step = DecodeStep(recorder, model, backend, pool, facts.on_host, max_pages, shared, looks)
        self._max_pages = max_pages
        self._check = check
        patience = PATIENCE_WITH_CHECK if check else facts.patience
        self.graphs: StepGraphs[FixedInputs, Tensor] = StepGraphs(
            limit,
            self._step.make,
            patience=patience,
            budget=budget,
            sizes=sharing_sizes(limit) if shared else None,
            inline=not facts.records_idle,
            padded=limit,
            looks=looks,
        )

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor | None:
        """Hidden states [R, N] of a decode step, valid until the next one; None: another way runs it."""
        found = self.found(step)
        return None if found is None else self.replayed(step, found, ready)

    def found(self, step: Step) -> RecordedStep[FixedInputs, Tensor] | None:
        """The graph that runs it; None: there is none."""
        batch = step.batch
        if not batch.is_decode or batch.prompt_targets or not step.recordable or step.pages > self._max_pages:
            return None
        if self._shared and not step.shared:
            return None
        return self.graphs.get(batch.num_rows)

    def replayed(self, step: Step, found: RecordedStep[FixedInputs, Tensor], ready: Callable[[], None]) -> Tensor:
        """As `run`, by this graph."""
        step.put(found.inputs, found.size)
        ready()
        hidden_BN = found.replay()
        if self._check:
            check_replay(found.graph, [hidden_BN], lambda: [self._step.eager(found.inputs)])
        if self._step.pool.routes is not None:
            self._step.pool.routes.show(found.inputs.routes)
        return hidden_BN[: step.batch.num_rows]

    def drop(self) -> None:
        self.graphs.drop()

    @property
    def nbytes(self) -> int:
        return self.graphs.nbytes
