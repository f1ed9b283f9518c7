"""Any step as one recorded step whose numbers of tokens, rows and wanted positions are set anew for each replay.

For recorders that can do that (`GraphRecorder.resizes`): the CPU's. Nothing is padded and one recording serves every
step up to its limits: prefills, mixed steps, steps that verify drafts, and decode steps that have no graph of their own
yet. What it saves is the time that Python takes to call the ops.

Legend: T tokens, R rows, L wanted positions, N hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.memory import Latent
from phloem.engine.forward import run_forward
from phloem.engine.inputs import FixedInputs
from phloem.engine.recorded.graphs import StepGraphs
from phloem.kernels.calls import LATENT_SHORT
from phloem.kernels.graph import check_replay
from phloem.kvcache.routes import noting

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.engine.forward import Passes
    from phloem.engine.inputs import Step
    from phloem.kernels.graph import GraphRecorder, StepGraph
    from phloem.kvcache.pool import KVPool
    from phloem.platforms._facts import StepFacts


@dataclass(frozen=True, slots=True)
class FlexibleStep:
    """Makes the recorded step, of `most` tokens, rows and wanted positions."""

    recorder: GraphRecorder
    model: Passes
    backend: AttentionBackend
    pool: KVPool
    on_host: bool
    most: tuple[int, int, int]
    max_pages: int
    adapted: bool = False

    def eager(self, fixed: FixedInputs, sizes: tuple[int, ...]) -> Tensor:
        inputs = fixed.inputs.part(*sizes)
        return run_forward(self.model, self.backend, self.pool, inputs, inputs.logit_index)

    def make(self, size: int) -> tuple[FixedInputs, StepGraph, Tensor]:
        fixed = FixedInputs(self.pool, *self.most, self.max_pages, on_host=self.on_host, adapted=self.adapted)
        step = noting(self.pool.routes, fixed.routes.update, lambda sizes: self.eager(fixed, sizes))
        return fixed, *self.recorder.record_sizes(step, self.most)


class FlexibleSteps:
    """The recorded step of one runner, used by its thread alone (`recorded.choice.RecordedWay`).

    Args:
        tokens, rows: the most of a step; larger ones run eagerly. Every token may be a wanted position.
        max_pages: most pages of a row.
        check: compare each replay with an eager step.
        adapted: it is for steps with adapters, whichever these are; otherwise for those without.
    """

    def __init__(
        self,
        recorder: GraphRecorder,
        model: Passes,
        backend: AttentionBackend,
        pool: KVPool,
        facts: StepFacts,
        tokens: int,
        rows: int,
        max_pages: int,
        check: bool = False,
        adapted: bool = False,
    ) -> None:
        self.decision = "adapter_graph" if adapted else "prefill_graph"
        self._adapted = adapted
        # The recorder tells sizes apart by their values, and by those of a step that is smaller by 1, 2 and 3.
        most = (tokens + rows + 16, rows + 4, tokens + rows + 8)
        self._step = FlexibleStep(recorder, model, backend, pool, facts.on_host, most, max_pages, adapted)
        self._rows, self._max_pages = rows, max_pages
        self._check = check
        # Prompts of latent attention are faster as products of matrices, which no recording holds.
        self._longest = LATENT_SHORT if any(isinstance(spec, Latent) for spec in pool.memory) else tokens
        self.graphs: StepGraphs[FixedInputs, Tensor] = StepGraphs(tokens, self._step.make, patience=1, sizes=[tokens])

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor | None:
        """Hidden states [L, N] of the wanted positions, valid until the next step; None: another way runs it."""
        batch, wanted = step.batch, len(step.logit_index)
        if not step.flat or (batch.adapters is not None) != self._adapted:
            return None
        if batch.num_rows > self._rows or step.pages > self._max_pages:
            return None
        if int(batch.query_lens.max()) > self._longest:
            return None
        found = self.graphs.get(batch.num_tokens)
        if found is None:
            return None
        found.inputs.write([*step.arrays(batch.num_rows), *step.adapter_arrays()])
        if not wanted:  # a part of a prompt: one position stands for none, as sizes are above 0
            found.inputs.inputs.logit_index[0] = 0
        sizes = (batch.num_tokens, batch.num_rows, max(1, wanted))
        ready()
        hidden_LN = found.replay(*sizes)[: sizes[2]]
        if self._check:
            check_replay(found.graph, [hidden_LN], lambda: [self._step.eager(found.inputs, sizes)])
        if self._step.pool.routes is not None:
            self._step.pool.routes.show(found.inputs.routes)
        return hidden_LN[:wanted]

    def drop(self) -> None:
        self.graphs.drop()

    @property
    def nbytes(self) -> int:
        return self.graphs.nbytes
