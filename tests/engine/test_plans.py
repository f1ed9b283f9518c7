"""Batches on their way to other ranks: what comes is what was sent, and of tables only what is new is sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.core.batch import FROM_DEVICE, Batch
from phloem.engine.ranks import plans
from phloem.engine.ranks.parallel import decode_told, encode_told
from phloem.engine.ranks.plans import Cells, Packing, Plan, Unpacking


def batch(step: int, tables: list[Any], **more: Any) -> Batch:
    rows = len(tables[0])
    ones = np.ones(rows, np.int32)
    lens, ids = ones * 7, np.arange(rows, dtype=np.int32)
    made = tuple(np.array(table, np.int32).reshape(rows, -1) for table in tables)
    return Batch(step, np.arange(rows, dtype=np.int32), ones, lens, ids, made, ones, epoch=3, **more)


def told(packing: Packing, one: Batch) -> Plan:
    plan = decode_told(encode_told(packing.pack(one)))
    assert isinstance(plan, Plan)
    return plan


def same(one: Batch, other: Batch) -> None:
    assert len(other.input_ids) == one.num_tokens and (other.input_ids == FROM_DEVICE).all()
    for name in ("slots", "query_lens", "prefix_lens", "outputs"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    assert (one.step, one.epoch) == (other.step, other.epoch)
    assert [table.tolist() for table in one.tables] == [table.tolist() for table in other.tables]
    assert {row: ids.tolist() for row, ids in one.prompt_targets.items()} == {
        row: ids.tolist() for row, ids in other.prompt_targets.items()
    }


table = st.integers(1, 4).flatmap(
    lambda rows: st.integers(0, 5).flatmap(
        lambda pages: st.lists(
            st.lists(st.lists(st.integers(0, 3), min_size=pages, max_size=pages), min_size=rows, max_size=rows),
            min_size=2,
            max_size=2,
        )
    )
)


@given(st.lists(table, min_size=1, max_size=8), st.sampled_from([-1, plans.WHOLE]))
def test_what_comes_is_what_was_sent(tables: list[list[Any]], whole: int) -> None:
    """Of any tables one after another, told whole or by cells; a batch that has come does not change with the next."""
    packing, unpacking = Packing(), Unpacking()
    sent = [batch(step, each) for step, each in enumerate(tables)]
    with patch.object(plans, "WHOLE", whole):
        come = [unpacking.unpack(told(packing, one)) for one in sent]
    for one, other in zip(sent, come, strict=True):
        same(one, other)


def test_of_a_steady_step_a_few_cells_are_sent() -> None:
    packing, unpacking = Packing(), Unpacking()
    pages = np.arange(256 * 128).reshape(256, 128)
    first = batch(1, [pages])
    assert len(encode_told(packing.pack(first))) > pages.size * 4
    unpacking.unpack(Packing().pack(first))
    after = pages.copy()
    after[[3, 250], [7, 90]] = 77_777
    second = batch(2, [after])
    plan = told(packing, second)
    at = np.array([3 * 128 + 7, 250 * 128 + 90], np.int32)
    assert plan.tables == [Cells(128, at.tobytes(), b"\xd1/\x01\x00" * 2)]
    assert len(encode_told(plan)) < 6000
    same(second, unpacking.unpack(plan))
    third = replace(second, step=3, prefix_lens=second.prefix_lens + 1)
    plan = told(packing, third)
    assert plan.slots is plan.query_lens is plan.outputs is plan.tables is None
    assert len(encode_told(plan)) < 256 * 4 + 40  # how many tokens each row has
    same(third, unpacking.unpack(plan))
    assert told(packing, replace(third, step=4, tables=(after.copy(),))).tables == [Cells(128, b"", b"")]


def test_a_small_table_is_told_whole_and_rows_that_stay_are_not() -> None:
    """Also where the same slots come in another array, and in one of another type or order."""
    packing, unpacking = Packing(), Unpacking()
    first = batch(1, [np.zeros((64, 8), np.int32)])
    unpacking.unpack(told(packing, first))
    pages = np.arange(8 * 64, dtype=np.int32).reshape(8, 64).T
    second = replace(first, step=2, tables=(pages,), slots=first.slots.astype(np.int64))
    plan = told(packing, second)
    assert plan.tables == [np.ascontiguousarray(pages).tobytes()] and plan.slots is None
    same(second, unpacking.unpack(plan))


def test_of_rows_that_become_longer_only_new_pages_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "WHOLE", -1)
    packing, unpacking = Packing(), Unpacking()
    pages = np.arange(1, 641, dtype=np.int32).reshape(64, 10)
    unpacking.unpack(told(packing, batch(1, [pages])))
    wider = np.zeros((64, 11), np.int32)
    wider[:, :10], wider[5, 10] = pages, 900
    for step, table in ((2, wider), (3, wider[:, :9])):
        one = batch(step, [table])
        plan = told(packing, one)
        assert plan.tables is not None and isinstance(plan.tables[0], Cells) and len(plan.tables[0].at) <= 4
        same(one, unpacking.unpack(plan))


def test_adapters_of_rows_are_told_where_there_are_any() -> None:
    packing, unpacking = Packing(), Unpacking()
    one = batch(1, [[[1, 2], [3, 4]]], adapters=np.array([0, 3], np.int32))
    found = unpacking.unpack(told(packing, one))
    assert found.adapters is not None and found.adapters.tolist() == [0, 3]
    assert unpacking.unpack(told(packing, replace(one, step=2, adapters=None))).adapters is None


def test_plans_that_never_run_count_and_what_was_told_before_stays() -> None:
    """Each batch that has come is its own, however many follow before it runs."""
    packing, unpacking = Packing(), Unpacking()
    one = batch(1, [[[1, 2], [3, 4]]])
    sent = [one, replace(one, step=2, tables=(np.array([[1, 2], [3, 9]], np.int32),)), replace(one, step=3)]
    come = [unpacking.unpack(told(packing, each)) for each in sent]
    for each, other in zip(sent, come, strict=True):
        same(each, other)


def test_what_differs_from_nothing_and_what_one_rank_runs_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "WHOLE", -1)
    packing = Packing()
    packing.pack(batch(1, [[[1, 2, 3]]]))
    plan = packing.pack(batch(2, [[[1, 2, 4]]]))
    with pytest.raises(ValueError, match="a plan differs from one that was never told"):
        Unpacking().unpack(plan)
    other = Unpacking()
    other.unpack(Packing().pack(batch(1, [[[1], [2]]])))
    one = np.zeros(1, np.int32).tobytes()
    with pytest.raises(ValueError, match="a table of 1 rows differs from one that was never told"):
        other.unpack(msgspec.structs.replace(plan, slots=one))
    with pytest.raises(ValueError, match="pictures, or drafts of a model runs on one rank alone"):
        packing.pack(replace(batch(3, [[[1]]]), parents=np.array([2], np.int32)))
    same(batch(4, [[[5]]]), Unpacking().unpack(Packing().pack(batch(4, [[[5]]]))))
