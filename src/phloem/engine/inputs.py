"""From a `Batch` (numpy, host) to what a forward pass reads (tensors, device). No loop over rows or tokens.

Legend: R rows, T packed new tokens, P pages per row, L positions whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from phloem.engine.flight import plain_up
from phloem.kernels.ops import PagedBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.core.batch import Batch


@dataclass(slots=True)
class StepInputs:
    """Device tensors of one step, and which logits it wants."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    paged: PagedBatch
    logit_index: Tensor  # [L] int64: first the sampling rows' last tokens, in row order
    sampled_rows: NDArray[np.int64]  # rows that sample; logits[:len(sampled_rows)] are theirs


@dataclass(slots=True)
class HostInputs:
    """The same before it goes to the device, as numpy."""

    positions: NDArray[np.int64]  # [T]
    token_rows: NDArray[np.int64]  # [T] row of each token
    token_slots: NDArray[np.int32]  # [T]
    query_start: NDArray[np.int32]  # [R + 1]
    seq_lens: NDArray[np.int32]  # [R]
    sampled_rows: NDArray[np.int64]


def host_inputs(batch: Batch, page_size: int) -> HostInputs:
    """Positions, cache slots and row bounds of a step."""
    rows = batch.num_rows
    query_start = np.zeros(rows + 1, np.int32)
    np.cumsum(batch.query_lens, out=query_start[1:])
    token_rows = np.repeat(np.arange(rows), batch.query_lens)
    positions = np.arange(batch.num_tokens) - np.repeat(query_start[:-1] - batch.prefix_lens, batch.query_lens)
    pages = batch.page_table[token_rows, positions // page_size]
    token_slots = (pages * page_size + positions % page_size).astype(np.int32)
    return HostInputs(
        positions=positions,
        token_rows=token_rows,
        token_slots=token_slots,
        query_start=query_start,
        seq_lens=batch.prefix_lens + batch.query_lens,
        sampled_rows=np.flatnonzero(batch.sample),
    )


def prompt_positions(batch: Batch) -> NDArray[np.int64]:
    """Packed indices of the tokens whose logits are wanted for prompt logprobs, row by row in row order."""
    if not batch.prompt_targets:
        return np.zeros(0, np.int64)
    starts = np.cumsum(batch.query_lens) - batch.query_lens
    return np.concatenate([starts[row] + np.flatnonzero(batch.prompt_targets[row] >= 0) for row in prompt_rows(batch)])


def prompt_rows(batch: Batch) -> list[int]:
    """Rows with prompt logprobs, in the order in which their positions are packed."""
    return sorted(batch.prompt_targets)


def device_inputs(
    batch: Batch,
    page_size: int,
    last_tokens: Tensor,
    up: Callable[[Sequence[NDArray[Any]]], list[Tensor]] | None = None,
) -> StepInputs:
    """Move a step to the device of `last_tokens` ([slots] int64: each slot's last sampled token), by `up` if given."""
    host = host_inputs(batch, page_size)
    late = np.flatnonzero(batch.input_ids < 0)
    last = (host.query_start[1:].astype(np.int64) - 1)[host.sampled_rows]
    arrays: list[NDArray[Any]] = [
        batch.input_ids.astype(np.int64),
        host.positions.astype(np.int64),
        host.query_start,
        host.seq_lens.astype(np.int32),
        batch.page_table,
        host.token_slots,
        np.concatenate([last, prompt_positions(batch)]),
        late,
        batch.slots[host.token_rows[late]].astype(np.int64),
    ]
    moved = (up or plain_up(last_tokens.device))(arrays)
    input_ids = moved[0]
    if len(late):
        input_ids[moved[7]] = last_tokens[moved[8]]
    return StepInputs(
        input_ids=input_ids,
        positions=moved[1],
        paged=PagedBatch(
            query_start=moved[2],
            seq_lens=moved[3],
            page_table=moved[4],
            token_slots=moved[5],
            max_query_len=int(batch.query_lens.max()),
            max_seq_len=int(host.seq_lens.max()),
        ),
        logit_index=moved[6],
        sampled_rows=host.sampled_rows,
    )
