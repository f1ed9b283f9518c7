"""A step's inputs against a loop over rows and tokens, as its own tensors and in a recorded step's fixed ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from phloem.attention import StateRows
from phloem.core.batch import FROM_DEVICE, Batch, Embeds
from phloem.core.memory import Group
from phloem.engine import inputs as inputs_file
from phloem.engine.inputs import FixedInputs, Step, prompt_positions
from phloem.engine.transfer import LastTokens, plain_into
from phloem.engine.wanted import Wanted
from phloem.kernels.ops import PagedBatch

CPU = torch.device("cpu")
GROUPS = (Group("pages", 0, (0,)), Group("pages", 6, (1,)), Group("state", 0, (2,)))
POOL: Any = SimpleNamespace(groups=GROUPS, page_size=4, device=CPU)


def make_batch(**changes: Any) -> Batch:
    table = np.array([[5, 6, 0], [7, 8, 9], [1, 2, 0]], np.int32)
    fields: dict[str, Any] = {
        "step": 1,
        "slots": np.array([3, 0, 2], np.int32),
        "query_lens": np.array([1, 5, 2], np.int32),
        "prefix_lens": np.array([6, 0, 4], np.int32),
        "input_ids": np.array([FROM_DEVICE, 10, 11, 12, 13, 14, 20, 21], np.int32),
        "tables": (table, table + 10, np.array([[4, 5], [6, 6], [1, 2]], np.int32)),
        "outputs": np.array([1, 0, 1], np.int32),
        "prompt_targets": {1: np.array([11, 12, -1, 14, -1], np.int32)},
    }
    return Batch(**fields | changes)


def decode_batch() -> Batch:
    ones = np.ones(3, np.int32)
    return make_batch(query_lens=ones, input_ids=ones * -1, outputs=ones, prompt_targets={})


def step_of(batch: Batch, on_host: bool = True) -> Step:
    last = LastTokens(4, CPU, on_host, None)
    last.values.copy_(torch.tensor([90, 91, 92, 93]))
    return Step(batch, Wanted.of(batch), POOL, last)


@pytest.mark.parametrize("on_host", [True, False])
def test_positions_slots_and_late_tokens(on_host: bool) -> None:
    inputs = step_of(make_batch(), on_host).inputs
    assert inputs.input_ids.tolist() == [93, 10, 11, 12, 13, 14, 20, 21]
    assert inputs.positions.tolist() == [6, 0, 1, 2, 3, 4, 4, 5]
    assert inputs.input_ids.dtype == inputs.positions.dtype == torch.int64
    full, window, states = inputs.rows()
    assert isinstance(full, PagedBatch) and isinstance(window, PagedBatch) and isinstance(states, StateRows)
    assert full.token_slots.tolist() == [26, 28, 29, 30, 31, 32, 8, 9] and full.token_slots.dtype == torch.int32
    assert window.token_slots.tolist() == [slot + 40 for slot in full.token_slots.tolist()]
    assert window.page_table.tolist() == (full.page_table + 10).tolist()
    assert full.query_start.tolist() == [0, 1, 6, 8] and window.query_start is full.query_start
    assert full.seq_lens.tolist() == [7, 5, 6] and window.seq_lens is full.seq_lens
    assert (full.max_query_len, full.max_seq_len) == (5, 7)
    assert states.reads.tolist() == [4, 6, 1] and states.writes.tolist() == [5, 6, 2]
    assert states.fresh.tolist() == [False, True, False] and states.prefix_lens.tolist() == [6, 0, 4]
    assert states.query_start is full.query_start and states.reads.dtype == torch.int64


def test_logits_of_sampling_rows_come_first_then_prompt_positions() -> None:
    batch = make_batch()
    assert prompt_positions(batch).tolist() == [1, 2, 4]
    assert step_of(batch).inputs.logit_index.tolist() == [0, 7, 1, 2, 4]


def test_a_row_that_verifies_wants_its_last_positions() -> None:
    batch = make_batch(outputs=np.array([0, 3, 2], np.int32), prompt_targets={})
    assert step_of(batch).inputs.logit_index.tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("on_host", [True, False])
def test_a_padded_step_in_fixed_inputs_leaves_its_own_rows_as_they_are(on_host: bool) -> None:
    fixed = FixedInputs(POOL, 5, 5, 5, 6, on_host=on_host)
    for tensor in fixed.inputs.tensors[:2]:
        tensor.fill_(77)  # what a longer step left
    step = step_of(decode_batch(), on_host)
    fixed.write(step.arrays(5))
    own = step.inputs
    part = fixed.inputs.part(3, 3, 3)
    assert part.input_ids.tolist() == own.input_ids.tolist() == [93, 90, 92]
    for a, b in zip(part.rows(), own.rows(), strict=True):
        if isinstance(a, StateRows) and isinstance(b, StateRows):
            assert [a.reads.tolist(), a.writes.tolist(), a.fresh.tolist()] == [
                *(b.reads.tolist(), b.writes.tolist(), b.fresh.tolist()),
            ]
        else:
            assert isinstance(a, PagedBatch) and isinstance(b, PagedBatch)
            assert a.page_table[:, :3].tolist() == b.page_table.tolist()
            assert a.token_slots.tolist() == b.token_slots.tolist() and a.seq_lens.tolist() == b.seq_lens.tolist()
    full, window, states = fixed.inputs.rows()
    assert isinstance(full, PagedBatch) and isinstance(window, PagedBatch) and isinstance(states, StateRows)
    for pages in (full, window):  # the padding: one token each, on the scratch page
        assert pages.seq_lens[3:].tolist() == [1, 1] and pages.token_slots[3:].tolist() == [0, 0]
        assert pages.page_table[3:, 0].tolist() == [0, 0]
    assert states.writes[3:].tolist() == [0, 0] and states.fresh[3:].tolist() == [True, True]
    assert full.query_start.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_a_recorded_step_cannot_have() -> None:
    plain = make_batch()
    assert step_of(plain).recordable
    rows = [Embeds(2, np.ones((2, 8), np.float32)), Embeds(6, np.zeros((1, 8), np.float32))]
    seen = step_of(make_batch(embeds=rows, adapters=np.array([2, 0, 1], np.int32)))
    assert not seen.recordable
    assert seen.inputs.embeds is not None and seen.inputs.embeds[0].tolist() == [2, 3, 6]
    assert seen.inputs.embeds[1].tolist() == [[1.0] * 8, [1.0] * 8, [0.0] * 8]
    assert seen.inputs.adapters is not None
    each, kept = seen.inputs.adapters
    assert each.tolist() == [2, 0, 0, 0, 0, 0, 1, 1] and kept.tolist() == each[seen.inputs.logit_index].tolist()
    turned = step_of(make_batch(positions=np.arange(24).reshape(3, 8)))
    assert not turned.recordable and turned.inputs.positions.shape == (3, 8)
    moved = step_of(make_batch(positions=np.arange(8) + 3))
    assert moved.recordable and moved.inputs.positions.tolist() == list(range(3, 11))
    assert moved.inputs.rows()[0].token_slots.tolist()[0] == 26  # pages go by the place in the row


@pytest.mark.parametrize("direct", [0, 1 << 20])
@pytest.mark.parametrize("rows", [3, 5])
def test_one_transfer_fills_the_inputs_of_a_recorded_step(
    monkeypatch: pytest.MonkeyPatch, direct: int, rows: int
) -> None:
    """Tables that are spread on the device, and such that are sent whole; what a longer step left does not show."""
    monkeypatch.setattr(inputs_file, "DIRECT", direct)
    sent: list[int] = []

    def into(target: torch.Tensor, parts: Any) -> None:
        sent.append(len(parts))
        target[: max(at + array.nbytes for at, array in parts)] = 0xAA  # nothing may count on what lies between
        plain_into(target, parts)

    fixed = FixedInputs(POOL, rows, rows, rows, 6, on_host=False)
    before = [tensor.clone() for tensor in fixed.inputs.tensors]
    fixed.inputs.input_ids.fill_(77)
    step = step_of(decode_batch(), False)
    step.last.into = into
    step.put(fixed, rows)
    assert sent == [len(before) - 1]  # all but two that never change, and the slots
    want = FixedInputs(POOL, rows, rows, rows, 6, on_host=True)
    host = step_of(decode_batch(), True)
    host.put(want, rows)
    for number, (a, b) in enumerate(zip(fixed.inputs.tensors, want.inputs.tensors, strict=True)):
        if a.ndim > 1:
            a, b = a[:, :3], b[:, :3]
        assert torch.equal(a, b) and a.dtype == b.dtype and a.data_ptr() % 16 == 0, number
    assert torch.equal(fixed.inputs.tensors[2], before[2])
    assert step.last.at is not None and step.last.at.tolist() == decode_batch().slots.tolist()
