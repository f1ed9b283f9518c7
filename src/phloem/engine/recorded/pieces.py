"""Prefill and mixed steps in recorded pieces: everything but attention, at fixed counts of tokens.

Attention plans each step on the host from its rows, so it runs eagerly between the pieces, over the true tokens alone:
padding tokens reach no page. The pieces, padded to a bucket, end at the last layer's attention. What follows it (one
MLP and a norm) runs eagerly for the wanted rows: their number differs from step to step independently of the token
count, and buckets of both would multiply, while padding it to all tokens would compute the last MLP for nothing.

Legend: T tokens of the step, B tokens of the bucket, N hidden size, L wanted rows, H heads, K kv heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phloem.attention import begin
from phloem.engine.recorded.graphs import RecordedStep, StepGraphs
from phloem.engine.recorded.looks import Looks
from phloem.kernels.graph import RecordError, check_replay
from phloem.layers.context import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.attention import AttentionBackend
    from phloem.engine.inputs import Step
    from phloem.kernels.calls import IndexCall, LatentCall
    from phloem.kernels.graph import Cut, GraphRecorder, StepGraph
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, Heads, StateStep, StepMemory
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


@dataclass(slots=True)
class TokenInputs:
    """A bucket's fixed inputs."""

    input_ids: Tensor  # [B] int64
    positions: Tensor  # [B] int64


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
        self._attention = _Between(limit, looks)
        self._trunk = Trunk(recorder, model, pool.device, self._attention)
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
        tokens, fixed, inputs = step.batch.num_tokens, found.inputs, step.inputs
        for into, source in ((fixed.input_ids, inputs.input_ids), (fixed.positions, inputs.positions)):
            into[:tokens] = source
            into[tokens:] = 0
        ready()
        attention = self._attention
        attention.begin(begin(self._backend, inputs.rows(), self._pool), tokens)
        try:
            out, residual_BN = found.replay()
            if self._check:
                check_replay(found.graph, [out, residual_BN], lambda: self._trunk.run(fixed))
        finally:
            attention.end()
        return self._model.finish(out[:tokens], residual_BN[:tokens], inputs.logit_index)

    def drop(self) -> None:
        """Forget all pieces, for example because weights moved in memory."""
        self.graphs.drop()
        self._attention.drop()

    @property
    def nbytes(self) -> int:
        """Memory that the pieces and the buffers between them take."""
        return self.graphs.nbytes + self._attention.nbytes


@dataclass(frozen=True, slots=True)
class Trunk:
    """What is recorded: the model up to its last attention. It knows no graphs (`StepGraphs`)."""

    recorder: GraphRecorder
    model: CutModel
    device: torch.device
    attention: _Between

    def make(self, tokens: int) -> tuple[TokenInputs, StepGraph, tuple[Tensor, Tensor]]:
        ids, positions = (torch.zeros(tokens, dtype=torch.int64, device=self.device) for _ in range(2))
        fixed = TokenInputs(ids, positions)

        def in_pieces(cut: Cut) -> tuple[Tensor, Tensor]:
            self.attention.cut = cut
            return self.run(fixed)

        try:
            return fixed, *self.recorder.record_pieces(in_pieces)
        finally:
            self.attention.cut = _AtOnce()

    def run(self, inputs: TokenInputs) -> tuple[Tensor, Tensor]:
        attention = self.attention
        attention.left = len(self.model.attention_specs)
        out, residual_BN = self.model.trunk(ForwardBatch(inputs.input_ids, inputs.positions, attention, None))
        return out, attention.cut.hold(residual_BN)


class _AtOnce:
    """No cuts: each call runs where it stands."""

    def __call__(self, call: Callable[[], None], more: bool = True) -> None:
        call()

    def hold(self, x: Tensor) -> Tensor:
        return x


class _Between:
    """What the model takes for attention while it is recorded: ends a piece, and at each replay runs the attention of
    the step that then is, over its true tokens.

    The output is one buffer for all layers and buckets: a layer has used it up before the next one attends.
    """

    def __init__(self, limit: int, looks: Looks) -> None:
        self.cut: Cut = _AtOnce()
        self.left = 0  # attention calls of the forward pass that have not come yet
        self._look = looks.look
        self._limit = limit
        self._step: StepMemory | None = None
        self._tokens = 0
        self._outs: dict[tuple[Any, ...], Tensor] = {}

    def begin(self, step: StepMemory, tokens: int) -> None:
        self._step, self._tokens = step, tokens
        for out_BHD in self._outs.values():
            # What is left of a longer step need not be finite, and a router must not see that.
            out_BHD[tokens:] = 0

    def end(self) -> None:
        self._step = None

    def drop(self) -> None:
        self._outs.clear()

    @property
    def nbytes(self) -> int:
        return sum(out_BHD.nbytes for out_BHD in list(self._outs.values()))

    def attend_latent(
        self,
        pool: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        call: LatentCall,
        chosen: Tensor | None = None,
        /,
    ) -> Tensor:
        raise RecordError("latent attention does not run between pieces")

    def choose(self, pool: int, call: IndexCall, /) -> Tensor | None:
        raise RecordError("attention to chosen positions does not run between pieces")

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        self._look()
        out_BHD = self._out(heads.q)
        hold = self.cut.hold
        held = replace(heads, q=hold(heads.q), k=hold(heads.k), v=hold(heads.v))
        self.left -= 1
        self.cut(lambda: self._attend(spec, held, out_BHD), more=self.left > 0)
        return out_BHD

    def _attend(self, spec: AttentionSpec, held: Heads, out_BHD: Tensor) -> None:
        step, tokens = self._step, self._tokens
        assert step is not None, "pieces are replayed within a step"
        turn = held.rotation
        if turn is not None:
            turn = replace(turn, positions=turn.positions[:tokens])
        true = replace(held, q=held.q[:tokens], k=held.k[:tokens], v=held.v[:tokens], rotation=turn)
        out_BHD[:tokens] = step.attend(spec, true)

    def keep(self, pool: int, x_TN: Tensor, /) -> None:
        raise RecordError("states that a drafting head reads are not kept between pieces")

    def kept(self, pool: int, /) -> tuple[Tensor, Tensor]:
        raise RecordError("a drafting head does not run between pieces")

    def state(self, pool: int) -> StateStep:
        raise RecordError("a recurrent layer does not run between pieces")

    def _out(self, q_BHD: Tensor) -> Tensor:
        key = (q_BHD.shape[1:], q_BHD.dtype)
        if key not in self._outs:
            self._outs[key] = torch.zeros((self._limit, *q_BHD.shape[1:]), dtype=q_BHD.dtype, device=q_BHD.device)
        return self._outs[key][: len(q_BHD)]
