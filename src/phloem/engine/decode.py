"""Decode steps by recorded graphs: the step's inputs are copied into a bucket's fixed buffers, and the graph replayed.

The graph covers the forward pass up to the hidden states; the head and sampling, which depend on what the rows ask
for, run behind it.

Legend: R rows, B rows of the bucket, P pages per row, N hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from phloem.attention import begin
from phloem.engine.graphs import StepGraphs
from phloem.engine.inputs import StepInputs, device_inputs
from phloem.kernels.graph import check_replay
from phloem.kernels.ops import PagedBatch
from phloem.layers.context import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.attention import AttentionBackend
    from phloem.core.batch import Batch
    from phloem.kernels.graph import GraphRecorder
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model


# How often a bucket is wanted before it is recorded. On a CPU an eager step takes 1 or 2 ms longer than a replay, and
# recording takes 35: a bucket that a batch passes through as it empties is not worth it.
PATIENCE, PATIENCE_ON_CPU = 2, 12


def run_forward(
    model: Model, backend: AttentionBackend, pool: KVPool, inputs: StepInputs, index: Tensor | None
) -> Tensor:
    """One forward pass, eagerly: hidden states of the rows `index` (None: of all tokens)."""
    memory = begin(backend, inputs.paged, pool)
    return model.forward(ForwardBatch(inputs.input_ids, inputs.positions, memory, index))


class DecodeGraphs:
    """Recorded decode steps of one runner, used by its thread alone.

    `check`: compare each with an eager step. `budget`: bytes that they may take.
    """

    def __init__(
        self,
        recorder: GraphRecorder,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool,
        limit: int,
        max_pages: int,
        check: bool = False,
        budget: int | None = None,
    ) -> None:
        self._model, self._backend, self._pool = model, backend, pool
        self._max_pages = max_pages
        self._check = check
        self._host: dict[int, HostBuffers] = {}
        patience = PATIENCE_ON_CPU if pool.device.type == "cpu" and not check else PATIENCE
        self.graphs: StepGraphs[StepInputs, Tensor] = StepGraphs(
            recorder, limit, self._build, patience=patience, budget=budget
        )

    def run(
        self,
        batch: Batch,
        last_tokens: Tensor,
        up: Callable[[Sequence[NDArray[Any]]], list[Tensor]] | None = None,
        ready: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Hidden states [R, N] of a decode step, valid until the next one; None: run it eagerly.

        `ready` is called when only the replay is left to do.
        """
        rows = batch.num_rows
        if batch.page_table.shape[1] > self._max_pages:
            return None
        found = self.graphs.get(rows)
        if found is None:
            return None
        host = self._host.get(found.rows)
        if host is not None:
            host.fill(batch, last_tokens.numpy(), self._pool.page_size)
        else:
            _fill(found.inputs, device_inputs(batch, self._pool.page_size, last_tokens, up), rows)
        if ready is not None:
            ready()
        hidden_BN = found.replay()
        if self._check:
            check_replay(found.graph, [hidden_BN], lambda: [self._eager(found.inputs)])
        return hidden_BN[:rows]

    def _eager(self, inputs: StepInputs) -> Tensor:
        return run_forward(self._model, self._backend, self._pool, inputs, None)

    def _build(self, rows: int) -> tuple[StepInputs, Callable[[], Tensor]]:
        device = self._pool.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        inputs = StepInputs(
            input_ids=zeros(rows, dtype=torch.int64),
            positions=zeros(rows, dtype=torch.int64),
            paged=PagedBatch(
                query_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
                seq_lens=torch.ones(rows, dtype=torch.int32, device=device),
                page_table=zeros(rows, self._max_pages),
                token_slots=zeros(rows),
                max_query_len=1,
                max_seq_len=self._max_pages * self._pool.page_size,
            ),
            logit_index=zeros(0, dtype=torch.int64),
            sampled_rows=np.arange(rows),
        )
        if device.type == "cpu":
            self._host[rows] = HostBuffers.of(inputs)
        return inputs, lambda: self._eager(inputs)


@dataclass(slots=True)
class HostBuffers:
    """A bucket's buffers as numpy: on a CPU a step is written straight into them."""

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    page_table: NDArray[np.int32]
    token_slots: NDArray[np.int32]
    rows: NDArray[np.int64]  # 0, 1, 2, ...

    @staticmethod
    def of(inputs: StepInputs) -> HostBuffers:
        paged = inputs.paged
        return HostBuffers(
            inputs.input_ids.numpy(),
            inputs.positions.numpy(),
            paged.seq_lens.numpy(),
            paged.page_table.numpy(),
            paged.token_slots.numpy(),
            np.arange(len(inputs.input_ids)),
        )

    def fill(self, batch: Batch, last_tokens: NDArray[np.int64], page_size: int) -> None:
        """As `_fill`: rows beyond the step read and write the scratch page 0 alone."""
        rows, pages = batch.page_table.shape
        positions = batch.prefix_lens
        self.input_ids[:rows] = np.where(batch.input_ids < 0, last_tokens[batch.slots], batch.input_ids)
        self.positions[:rows] = positions
        self.seq_lens[:rows] = positions + 1
        self.page_table[:rows, :pages] = batch.page_table
        page, place = np.divmod(positions, page_size)
        self.token_slots[:rows] = batch.page_table[self.rows[:rows], page] * page_size + place
        if rows < len(self.input_ids):
            self.positions[rows:] = 0
            self.seq_lens[rows:] = 1
            self.token_slots[rows:] = 0
            self.page_table[rows:, 0] = 0


def _fill(fixed: StepInputs, step: StepInputs, rows: int) -> None:
    """Copy a step into a bucket's buffers. Rows beyond it read and write the scratch page 0 alone."""
    fixed.input_ids[:rows] = step.input_ids
    fixed.positions[:rows] = step.positions
    into, paged = fixed.paged, step.paged
    into.seq_lens[:rows] = paged.seq_lens
    into.token_slots[:rows] = paged.token_slots
    into.page_table[:rows, : paged.page_table.shape[1]] = paged.page_table
    if rows < len(fixed.input_ids):
        fixed.positions[rows:] = 0
        into.seq_lens[rows:] = 1
        into.token_slots[rows:] = 0
        into.page_table[rows:, 0] = 0
