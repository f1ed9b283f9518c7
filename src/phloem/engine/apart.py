"""Rows that verify drafts, as one row a token: the step is then computed as steps of one token each are, to the bit.

Attention of one query adds in another order than that of several; here each position of a verifying row is a row with
the same pages, one token longer than the one before it. All rows write their keys and values before any reads them, so
each sees those before it. A step of nothing but such rows is a decode step, for which there are recordings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from phloem.core.batch import Batch


def apart(batch: Batch) -> Batch:
    """The same tokens in the same order: each draft is a row, what is known before the drafts stays together."""
    if not (batch.outputs > 1).any():
        return batch
    counts = np.maximum(batch.outputs, 1)
    first = np.cumsum(counts) - counts
    rows = np.repeat(np.arange(batch.num_rows), counts)
    place = (np.arange(len(rows)) - first[rows]).astype(np.int32)
    known = (batch.query_lens - counts + 1)[rows].astype(np.int32)
    draft = place > 0
    return replace(
        batch,
        slots=batch.slots[rows],
        query_lens=np.where(draft, np.int32(1), known),
        prefix_lens=batch.prefix_lens[rows] + np.where(draft, known + place - 1, np.int32(0)),
        tables=tuple(table[rows] for table in batch.tables),
        outputs=np.minimum(batch.outputs, 1)[rows],
        prompt_targets={int(first[row]): targets for row, targets in batch.prompt_targets.items()},
        adapters=None if batch.adapters is None else batch.adapters[rows],
    )


def every_token(batch: Batch) -> Batch:
    """The same tokens in the same order, each as a row of its own: attention then adds in one order, whether a token
    is of a prompt, of a chunk of one, or decoded."""
    if batch.num_tokens == batch.num_rows:
        return batch
    rows = np.repeat(np.arange(batch.num_rows), batch.query_lens)
    starts = np.cumsum(batch.query_lens) - batch.query_lens
    place = (np.arange(batch.num_tokens) - starts[rows]).astype(np.int32)
    yields = place >= (batch.query_lens - batch.outputs)[rows]
    targets = {
        int(starts[row]) + at: one[at : at + 1] for row, one in batch.prompt_targets.items() for at in range(len(one))
    }
    return replace(
        batch,
        slots=batch.slots[rows],
        query_lens=np.ones(batch.num_tokens, np.int32),
        prefix_lens=batch.prefix_lens[rows] + place,
        tables=tuple(table[rows] for table in batch.tables),
        outputs=yields.astype(np.int32),
        prompt_targets=targets,
        adapters=None if batch.adapters is None else batch.adapters[rows],
    )
