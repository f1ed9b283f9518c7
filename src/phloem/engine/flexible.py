"""Prefill and mixed steps as one recorded step whose numbers of tokens and rows are set anew for each replay.

For tables whose recorder can do that (`kernels.graph.FlexibleRecorder`): the CPU's. Nothing is padded and one recording
serves every step up to its limits; what a short prompt saves is the time that Python takes to call the ops.

Legend: T tokens, R rows, L wanted positions, P pages per row, N hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.engine.decode import run_forward
from phloem.engine.graphs import StepGraphs
from phloem.engine.inputs import StepInputs
from phloem.kernels.graph import check_replay
from phloem.kernels.ops import PagedBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.kernels.graph import FlexibleRecorder, StepGraph
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model


class FlexibleSteps:
    """The recorded step of one runner, used by its thread alone. `check`: compare each replay with an eager step.

    Args:
        tokens, rows: the most of a step; larger ones run eagerly.
        max_pages: most pages of a row.
    """

    def __init__(
        self,
        recorder: FlexibleRecorder,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool,
        tokens: int,
        rows: int,
        max_pages: int,
        check: bool = False,
    ) -> None:
        self._model, self._backend, self._pool = model, backend, pool
        self._rows, self._max_pages = rows, max_pages
        # The recorder tells sizes apart by their values.
        self._most = (tokens + rows + 16, rows + 4, rows + 8)
        self._check = check
        self.graphs: StepGraphs[StepInputs, Tensor] = StepGraphs(
            _Sized(recorder, self._most), tokens, self._build, patience=1, sizes=[tokens]
        )

    def run(self, inputs: StepInputs) -> Tensor | None:
        """Hidden states [L, N] of the wanted positions, valid until the next step; None: run it eagerly."""
        tokens, (rows, pages) = inputs.input_ids.shape[0], inputs.paged.page_table.shape
        wanted = inputs.logit_index.shape[0]
        if wanted > self._rows or rows > self._rows or pages > self._max_pages:
            return None
        found = self.graphs.get(tokens)
        if found is None:
            return None
        fixed, paged, step = found.inputs, found.inputs.paged, inputs.paged
        fixed.input_ids[:tokens] = inputs.input_ids
        fixed.positions[:tokens] = inputs.positions
        fixed.logit_index[:wanted] = inputs.logit_index
        paged.query_start[: rows + 1] = step.query_start
        paged.seq_lens[:rows] = step.seq_lens
        paged.page_table[:rows, :pages] = step.page_table
        paged.token_slots[:tokens] = step.token_slots
        if not wanted:  # a part of a prompt: one position stands for none, as sizes are above 0
            fixed.logit_index[0] = 0
        sizes = (tokens, rows, max(1, wanted))
        found.graph.replay(*sizes)  # pyright: ignore[reportCallIssue] - as recorded by `_Sized`
        if self._check:
            check_replay(found.graph, [found.outputs[: sizes[2]]], lambda: [self._eager(fixed, sizes)])
        return found.outputs[:wanted]

    def drop(self) -> None:
        """Forget the recording, because weights moved in memory."""
        self.graphs.drop()

    @property
    def nbytes(self) -> int:
        return self.graphs.nbytes

    def _eager(self, fixed: StepInputs, sizes: tuple[int, ...]) -> Tensor:
        tokens, rows, wanted = sizes
        paged = fixed.paged
        inputs = StepInputs(
            input_ids=fixed.input_ids[:tokens],
            positions=fixed.positions[:tokens],
            paged=PagedBatch(
                query_start=paged.query_start[: rows + 1],
                seq_lens=paged.seq_lens[:rows],
                page_table=paged.page_table[:rows],
                token_slots=paged.token_slots[:tokens],
                max_query_len=tokens,
                max_seq_len=paged.max_seq_len,
            ),
            logit_index=fixed.logit_index[:wanted],
            sampled_rows=np.arange(wanted),
        )
        return run_forward(self._model, self._backend, self._pool, inputs, inputs.logit_index)

    def _build(self, size: int) -> tuple[StepInputs, Any]:
        tokens, rows, wanted = self._most

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._pool.device)

        fixed = StepInputs(
            input_ids=zeros(tokens, dtype=torch.int64),
            positions=zeros(tokens, dtype=torch.int64),
            paged=PagedBatch(
                query_start=zeros(rows + 1),
                seq_lens=zeros(rows),
                page_table=zeros(rows, self._max_pages),
                token_slots=zeros(tokens),
                max_query_len=tokens,
                max_seq_len=self._max_pages * self._pool.page_size,
            ),
            logit_index=zeros(wanted, dtype=torch.int64),
            sampled_rows=np.arange(wanted),
        )
        return fixed, lambda sizes: self._eager(fixed, sizes)  # pyright: ignore[reportUnknownLambdaType]


class _Sized:
    """A recorder of functions over sizes, behind the face of one of functions without."""

    def __init__(self, recorder: FlexibleRecorder, sizes: tuple[int, ...]) -> None:
        self._recorder, self._sizes = recorder, sizes

    def record(self, fn: Callable[..., Any]) -> tuple[StepGraph, Any]:
        return self._recorder.record_sizes(fn, self._sizes)
