"""A step's device inputs against a loop over rows and tokens."""

from __future__ import annotations

import numpy as np
import torch

from phloem.core.batch import FROM_DEVICE, Batch
from phloem.engine.inputs import device_inputs, prompt_positions


def make_batch() -> Batch:
    return Batch(
        step=1,
        slots=np.array([3, 0, 2], np.int32),
        query_lens=np.array([1, 5, 2], np.int32),
        prefix_lens=np.array([6, 0, 4], np.int32),
        input_ids=np.array([FROM_DEVICE, 10, 11, 12, 13, 14, 20, 21], np.int32),
        page_table=np.array([[5, 6, 0], [7, 8, 9], [1, 2, 0]], np.int32),
        sample=np.array([True, False, True]),
        prompt_targets={1: np.array([11, 12, -1, 14, -1], np.int32)},
    )


def test_positions_slots_and_late_tokens() -> None:
    last = torch.tensor([90, 91, 92, 93])
    inputs = device_inputs(make_batch(), 4, last)
    assert inputs.input_ids.tolist() == [93, 10, 11, 12, 13, 14, 20, 21]
    assert inputs.positions.tolist() == [6, 0, 1, 2, 3, 4, 4, 5]
    assert inputs.paged.token_slots.tolist() == [26, 28, 29, 30, 31, 32, 8, 9]
    assert inputs.paged.query_start.tolist() == [0, 1, 6, 8]
    assert inputs.paged.seq_lens.tolist() == [7, 5, 6]
    assert (inputs.paged.max_query_len, inputs.paged.max_seq_len) == (5, 7)
    assert inputs.sampled_rows.tolist() == [0, 2]


def test_logits_of_sampling_rows_come_first_then_prompt_positions() -> None:
    batch = make_batch()
    assert prompt_positions(batch).tolist() == [1, 2, 4]
    assert device_inputs(batch, 4, torch.zeros(4, dtype=torch.int64)).logit_index.tolist() == [0, 7, 1, 2, 4]
