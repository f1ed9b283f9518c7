"""Recurrent states behind a step that verified drafts: they have taken in what was refused, and cannot be cut back.

A step reads its states from where the last one left them and writes elsewhere. So the rows whose drafts were refused
run once more from what they had read, with the tokens that count alone, and write the same places.

Legend: R rows, T packed tokens, L positions that yield.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phloem.core.batch import Batch
    from phloem.engine.wanted import Wanted


def again(batch: Batch, wanted: Wanted, tokens_L: NDArray[np.integer]) -> Batch | None:
    """The rows of which a draft was refused, without what was refused; they yield nothing. None: there are none.

    `tokens_L`: what was chosen at each position that yields.
    """
    if wanted.starts is None:
        return None
    refused_R = np.zeros(batch.num_rows, np.int32)
    ends = np.append(wanted.starts[1:], len(wanted.rows))
    refused_R[wanted.rows[wanted.starts]] = ends - 1 - wanted.last(tokens_L)
    rows = np.flatnonzero(refused_R)
    if not len(rows):
        return None
    lens = (batch.query_lens - refused_R)[rows]
    starts = (np.cumsum(batch.query_lens) - batch.query_lens)[rows]
    at = np.repeat(starts - (np.cumsum(lens) - lens), lens) + np.arange(lens.sum())
    return replace(
        batch,
        slots=batch.slots[rows],
        query_lens=lens,
        prefix_lens=batch.prefix_lens[rows],
        input_ids=batch.input_ids[at],
        tables=tuple(table[rows] for table in batch.tables),
        outputs=np.zeros(len(rows), np.int32),
        positions=None if batch.positions is None else batch.positions[..., at],
        adapters=None if batch.adapters is None else batch.adapters[rows],
        admissions=[],
        prompt_targets={},
        drafts=None,
        drafting=None,
    )
