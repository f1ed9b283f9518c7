"""Decode steps by recorded graphs: the step's inputs are copied into a bucket's fixed buffers, and the graph replayed.

The graph covers the forward pass up to the hidden states; the head and sampling, which depend on what the rows ask
for, run behind it.

Legend: R rows, B rows of the bucket, P pages per row, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from phloem.engine.graphs import StepGraphs
from phloem.engine.inputs import StepInputs
from phloem.kernels.graph import check_replay
from phloem.kernels.ops import PagedBatch
from phloem.layers.context import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.attention import AttentionBackend
    from phloem.kernels.graph import GraphRecorder
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model


def run_forward(
    model: Model, backend: AttentionBackend, pool: KVPool, inputs: StepInputs, index: Tensor | None
) -> Tensor:
    """One forward pass, eagerly: hidden states of the rows `index` (None: of all tokens)."""
    attention = backend.begin(inputs.paged, pool)
    return model.forward(ForwardBatch(inputs.input_ids, inputs.positions, attention, index))


class DecodeGraphs:
    """Recorded decode steps of one runner, used by its thread alone. `check`: compare each with an eager step."""

    def __init__(
        self,
        recorder: GraphRecorder,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool,
        limit: int,
        max_pages: int,
        check: bool = False,
    ) -> None:
        self._model, self._backend, self._pool = model, backend, pool
        self._max_pages = max_pages
        self._check = check
        self.graphs: StepGraphs[StepInputs, Tensor] = StepGraphs(recorder, limit, self._build)

    def run(self, step: StepInputs) -> Tensor | None:
        """Hidden states [R, N] of a decode step, valid until the next one; None: run it eagerly."""
        rows = len(step.input_ids)
        if step.paged.page_table.shape[1] > self._max_pages:
            return None
        found = self.graphs.get(rows)
        if found is None:
            return None
        _fill(found.inputs, step, rows)
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
        return inputs, lambda: self._eager(inputs)


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
