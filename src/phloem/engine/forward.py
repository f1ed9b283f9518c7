"""The forward pass of a step, by the first of several ways that takes it.

A way may decline a step (None): what is recorded serves some steps, running eagerly serves all.

Legend: L wanted positions, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from phloem.attention import Memory, begin
from phloem.attention._both_ways import both_ways
from phloem.engine.drafts.branches import Echoing
from phloem.layers.context import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.engine.inputs import Step, StepInputs
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import StepMemory
    from phloem.models import Model


class Way(Protocol):
    """One way of running steps."""

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor | None:
        """Hidden states [L, N] of the wanted positions, valid until the next step; None: not by this way.

        `ready` is called when only the computation is left to do.
        """
        ...


class Passes(Protocol):
    """What has a forward pass: a model, or all ranks' shares of one."""

    def forward(self, step: ForwardBatch, /) -> Tensor: ...


def run_forward(
    model: Passes,
    backend: AttentionBackend,
    pool: KVPool,
    inputs: StepInputs,
    index: Tensor | None,
    memory: StepMemory | None = None,
) -> Tensor:
    """One forward pass, eagerly: hidden states of the rows `index` (None: of all tokens). `memory`: what layers attend
    by; None: the backend's, over the pool."""
    if memory is None and inputs.echo is not None:
        rows, source = inputs.echo
        memory = Echoing(begin(backend, rows, pool), source, len(inputs.input_ids))
    elif memory is None:
        memory = begin(backend, inputs.rows(), pool)
    if inputs.spans is not None and inputs.echo is None:
        assert isinstance(memory, Memory)
        memory = both_ways(memory, backend.ops, inputs.spans)
    step = ForwardBatch(inputs.input_ids, inputs.positions, memory, index, inputs.adapters, inputs.embeds, inputs.deep)
    if pool.routes is None or index is None:
        return model.forward(step)
    # The last layer tells of every token's experts only if it computes every token.
    step.logit_index = None
    step.adapters = None if inputs.adapters is None else (inputs.adapters[0], inputs.adapters[0])
    return backend.ops.select_rows(model.forward(step), index)


class Eager:
    """Op by op: serves every step."""

    def __init__(self, model: Model, backend: AttentionBackend, pool: KVPool) -> None:
        self._model, self._backend, self._pool = model, backend, pool

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor:
        inputs = step.inputs
        ready()
        return run_forward(self._model, self._backend, self._pool, inputs, inputs.logit_index)


class Forward:
    """The ways in their order; the last one takes whatever the others decline."""

    def __init__(self, ways: Sequence[Way], last: Eager) -> None:
        self._ways, self._last = ways, last

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor:
        for way in self._ways:
            hidden_LN = way.run(step, ready)
            if hidden_LN is not None:
                return hidden_LN
        return self._last.run(step, ready)
