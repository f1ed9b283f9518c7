"""Prefill and mixed steps in recorded pieces: everything but what depends on rows, at fixed counts of tokens.

Attention plans each step on the host from its rows, and a recurrent layer's scan goes through them, so they run eagerly
between the pieces, over the true tokens alone: padding tokens reach no page and no state. The pieces, padded to a
bucket, end at the last layer's mixer. What follows it (one MLP and a norm) runs eagerly for the wanted rows: their
number differs from step to step independently of the token count, and buckets of both would multiply, while padding it
to all tokens would compute the last MLP for nothing.

Legend: T tokens of the step, B tokens of the bucket, N hidden size, L wanted rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.attention import begin
from phloem.engine.recorded.between import AtOnce, Between, TokenInputs
from phloem.engine.recorded.graphs import RecordedStep, StepGraphs
from phloem.engine.recorded.looks import Looks
from phloem.kernels.graph import check_replay
from phloem.layers.context import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.engine.inputs import Step
    from phloem.kernels.graph import Cut, GraphRecorder, StepGraph
    from phloem.kvcache.pool import KVPool
    from phloem.models import CutModel

DENSE = 256  # tokens up to which a step mostly waits for the weights, so that padding costs little


def token_buckets(limit: int) -> list[int]:
    """Token counts with pieces of their own: powers of two, two to an octave from 16 to `DENSE`, then eight.

    1, 2, 4, 8, 16, 24, 32, 48, ..., 256, 288, 320, ..., 512, 576, ... and `limit` itself.
    """
    sizes: list[int] = []
    size = 1
    while size < limit:
        sizes.append(size)
        octave = 1 << (size.bit_length() - 1)
        size += octave // 8 if size >= DENSE else octave // 2 if size >= 16 else octave
    return [*sizes, limit] if limit > 0 else []


class PieceGraphs:
    """Recorded pieces of one runner's prefill and mixed steps, used by its thread alone
    (`recorded.choice.RecordedWay`).

    Args:
        limit: most tokens of a step that runs in pieces.
        decodes: decode steps run in pieces too; not where each will have a graph of its own soon.
        budget: bytes that all pieces together may take; None for no bound.
        check: compare the pieces of each step with the same pieces run eagerly.
        inline: as in `StepGraphs`.
        leaves: a recording may be left for a step that waits; not where other ranks make it too.
    """

    decision = "piecewise_graphs"

    def __init__(
        self,
        recorder: GraphRecorder,
        model: CutModel,
        backend: AttentionBackend,
        pool: KVPool,
        limit: int,
        *,
        decodes: bool = True,
        budget: int | None = None,
        check: bool = False,
        inline: bool = True,
        leaves: bool = True,
    ) -> None:
        self._model, self._backend, self._pool = model, backend, pool
        self._decodes = decodes
        self._check = check
        looks = Looks(leaves=leaves)
        self._between = Between(pool, backend.ops, limit, looks)
        self._trunk = Trunk(recorder, model, pool, self._between)
        self.graphs: StepGraphs[TokenInputs, tuple[Tensor, Tensor]] = StepGraphs(
            limit,
            self._trunk.make,
            budget=budget,
            sizes=token_buckets(limit),
            unit="tokens",
            inline=inline,
            padded=DENSE,
            looks=looks,
        )

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor | None:
        """Hidden states [L, N] of the wanted rows; None: another way runs the step."""
        found = self.found(step)
        return None if found is None else self.replayed(step, found, ready)

    def found(self, step: Step) -> RecordedStep[TokenInputs, tuple[Tensor, Tensor]] | None:
        """The pieces that run it; None: there are none."""
        if not step.recordable or (step.batch.is_decode and not self._decodes):
            return None
        return self.graphs.get(step.batch.num_tokens)

    def replayed(
        self, step: Step, found: RecordedStep[TokenInputs, tuple[Tensor, Tensor]], ready: Callable[[], None]
    ) -> Tensor:
        """As `run`, by these pieces."""
        inputs = step.inputs
        found.inputs.fill(inputs.input_ids, inputs.positions, inputs.rows())
        ready()
        memory = begin(self._backend, inputs.rows(), self._pool)
        return self.passed(found, ForwardBatch(inputs.input_ids, inputs.positions, memory, inputs.logit_index))

    def passed(self, found: RecordedStep[TokenInputs, tuple[Tensor, Tensor]], step: ForwardBatch) -> Tensor:
        """What the model's forward pass gives of a step whose tokens are in these pieces' inputs."""
        tokens, between = len(step.input_ids), self._between
        between.begin(step.memory, tokens)
        try:
            out, residual_BN = found.replay()
            if self._check:
                check_replay(found.graph, [out, residual_BN], lambda: self._trunk.run(found.inputs))
        finally:
            between.end()
        return self._model.conclude(step, out[:tokens], residual_BN[:tokens])

    def drop(self) -> None:
        """Forget all pieces, for example because weights moved in memory."""
        self.graphs.drop()
        self._between.drop()

    @property
    def nbytes(self) -> int:
        """Memory that the pieces and the buffers between them take."""
        return self.graphs.nbytes + self._between.nbytes


@dataclass(frozen=True, slots=True)
class Trunk:
    """What is recorded: the model up to its last mixer. It knows no graphs (`StepGraphs`)."""

    recorder: GraphRecorder
    model: CutModel
    pool: KVPool
    between: Between

    def make(self, tokens: int) -> tuple[TokenInputs, StepGraph, tuple[Tensor, Tensor]]:
        fixed = TokenInputs.of(tokens, self.pool)

        def in_pieces(cut: Cut) -> tuple[Tensor, Tensor]:
            self.between.cut = cut
            return self.run(fixed)

        try:
            return fixed, *self.recorder.record_pieces(in_pieces)
        finally:
            self.between.cut = AtOnce()

    def run(self, inputs: TokenInputs) -> tuple[Tensor, Tensor]:
        between = self.between
        step = ForwardBatch(inputs.input_ids, inputs.positions, between, None)
        out, residual_BN = between.run(self.model.trunk, step, inputs, self.model.late_residual)
        hold = between.cut.hold
        return out if between.ends else hold(out), hold(residual_BN)
