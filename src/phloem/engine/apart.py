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
    """The same tokens in the same order; a row keeps its tokens together where some of them are not wanted."""
    split = (batch.outputs > 1) & (batch.query_lens == batch.outputs)
    if not split.any():
        return batch
    counts = np.where(split, batch.outputs, 1)
    first = np.cumsum(counts) - counts
    rows = np.repeat(np.arange(batch.num_rows), counts)
    alone = split[rows]
    return replace(
        batch,
        slots=batch.slots[rows],
        query_lens=np.where(alone, np.int32(1), batch.query_lens[rows]),
        prefix_lens=batch.prefix_lens[rows] + (np.arange(len(rows)) - first[rows]).astype(np.int32),
        tables=tuple(table[rows] for table in batch.tables),
        outputs=np.where(alone, np.int32(1), batch.outputs[rows]),
        prompt_targets={int(first[row]): targets for row, targets in batch.prompt_targets.items()},
        adapters=None if batch.adapters is None else batch.adapters[rows],
    )
