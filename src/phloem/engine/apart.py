"""Rows of a step cut into shorter ones: what a token is given then does not depend on the tokens beside it, to the bit.

Attention of one query adds in another order than that of several. So each token of an answer is a row of its own,
whether it is decoded, drafted or forced by a grammar: with the same pages, one token longer than the row before it. All
rows write their keys and values before any reads them, so each sees those before it. A step in which every row decodes
or verifies becomes a decode step by that, for which there are recordings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phloem.core.batch import Batch


def apart(batch: Batch, prompts: NDArray[np.int32]) -> Batch:
    """The same tokens in the same order: what a row has of its prompt stays together, each other token is a row.

    `prompts` [R]: tokens of each row's prompt.
    """
    if batch.num_tokens == batch.num_rows:
        return batch
    together = np.clip(prompts - batch.prefix_lens, 0, batch.query_lens)
    heads = together > 0
    counts = heads + batch.query_lens - together
    if len(counts) == counts.sum():
        return batch
    lens = np.ones(counts.sum(), np.int32)
    lens[(np.cumsum(counts) - counts)[heads]] = together[heads]
    return cut(batch, lens)


def drafts_apart(batch: Batch) -> Batch:
    """The same tokens in the same order: what is known of a row stays together, each draft is a row."""
    drafts = np.maximum(batch.outputs - 1, 0)
    lens = np.ones(batch.num_rows + drafts.sum(), np.int32)
    lens[np.arange(batch.num_rows) + np.cumsum(drafts) - drafts] = batch.query_lens - drafts
    return cut(batch, lens)


def every_token(batch: Batch) -> Batch:
    """The same tokens in the same order, each as a row of its own: attention then adds in one order, whether a token
    is of a prompt, of a chunk of one, or decoded."""
    return cut(batch, np.ones(batch.num_tokens, np.int32))


def cut(batch: Batch, lens: NDArray[np.int32]) -> Batch:
    """The same tokens in the same order, in rows of these lengths, each of which lies within a row of the batch."""
    if len(lens) == batch.num_rows:
        return batch
    ends, wholes = np.cumsum(lens), np.cumsum(batch.query_lens)
    rows = np.searchsorted(wholes, ends - lens, side="right")
    place = (ends - lens - (wholes - batch.query_lens)[rows]).astype(np.int32)
    yields = np.clip(ends - (wholes - batch.outputs)[rows], 0, lens)
    targets = {
        int(new): batch.prompt_targets[row][place[new] : place[new] + lens[new]]
        for row in batch.prompt_targets
        for new in np.flatnonzero(rows == row)
    }
    return replace(
        batch,
        slots=batch.slots[rows],
        query_lens=lens,
        prefix_lens=batch.prefix_lens[rows] + place,
        tables=tuple(table[rows] for table in batch.tables),
        outputs=yields.astype(np.int32),
        prompt_targets=targets,
        adapters=None if batch.adapters is None else batch.adapters[rows],
    )


def part(batch: Batch, rows: NDArray[np.integer], tokens: NDArray[np.integer]) -> Batch:
    """These rows of a batch, with their tokens."""
    return replace(
        batch,
        slots=batch.slots[rows],
        query_lens=batch.query_lens[rows],
        prefix_lens=batch.prefix_lens[rows],
        input_ids=batch.input_ids[tokens],
        tables=tuple(table[rows] for table in batch.tables),
        outputs=batch.outputs[rows],
        prompt_targets={},
        positions=None if batch.positions is None else batch.positions[..., tokens],
    )
