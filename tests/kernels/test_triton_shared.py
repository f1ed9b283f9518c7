"""Pages that rows share, attended to once for all of them: the same as plain torch, under the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from triton_support import DTYPES, assert_close, need_interpreter, paged

from phloem.attention._cascade import Shared, Sharing, find, fixed_sizes
from phloem.kernels import reference_attention as ref
from phloem.kernels.calls import AttentionCall, PagedBatch, SharedPages

need_interpreter()
from phloem.kernels.triton import attention  # noqa: E402

CHEAP = Sharing(tile=4, programs=24, splits=(16, 8), token_bytes=1 << 30, part_bytes=1)
LENGTHS = [300, 40, 420, 513, 290, 150, 700]


def sharing(queries: list[int], heads: tuple[int, int, int], dtype: torch.dtype, page: int = 16) -> tuple[Any, ...]:
    """Rows 0, 2 and 4 begin with 272 common tokens, rows 3 and 6 with 512, the others alone."""
    head_count, kv_heads, head = heads
    torch.manual_seed(5)
    batch, k_cache, v_cache = paged(queries, LENGTHS, page, kv_heads, head, dtype)
    for row, leader, tokens in ((2, 0, 272), (4, 0, 272), (6, 3, 512)):
        batch.page_table[row, : tokens // page] = batch.page_table[leader, : tokens // page]
    query = np.array(queries, np.int32)
    prefix = np.array(LENGTHS, np.int32) - query
    found = find(batch.page_table.numpy(), query, prefix, page, 0, CHEAP)
    assert found is not None and found.lens.tolist() == [272, 0, 272, 512, 272, 0, 512]
    q = torch.randn(sum(queries), head_count, head).to(dtype)
    return q, (k_cache, v_cache), batch, found


def on_device(found: Shared) -> SharedPages:
    return SharedPages(*map(torch.from_numpy, found.arrays))


CASES = [
    # H, K, D, window, soft cap, sinks
    (8, 2, 32, 0, 0.0, False),
    (6, 2, 24, 0, 0.0, True),
    (4, 4, 16, 260, 0.0, True),
    (7, 1, 16, 40, 5.0, False),
]


@pytest.mark.some(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("queries", [[1] * 7, [1, 3, 2, 1, 4, 30, 1]])
def test_shared_pages_read_once_give_what_reading_them_for_each_row_gives(
    queries: list[int], case: tuple[Any, ...], dtype: torch.dtype
) -> None:
    *heads, window, cap, sunk = case
    q, cache, batch, found = sharing(queries, (heads[0], heads[1], heads[2]), dtype)
    call = AttentionCall(heads[2] ** -0.5, window, cap, torch.randn(heads[0]) if sunk else None)
    want = ref.paged_attention(q, cache, batch, call)
    got = attention.paged_attention(q, cache, replace(batch, shared=on_device(found)), call)
    assert_close(got, want, dtype)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("per_head", [False, True])
def test_with_parts_of_their_own_and_a_scaled_float8_cache(splits: int, per_head: bool) -> None:
    q, (k_cache, v_cache), batch, found = sharing([1] * 7, (6, 2, 32), torch.float32)
    cache = tuple(x.nan_to_num().to(torch.float8_e4m3fn) for x in (k_cache, v_cache))
    scales = tuple(torch.tensor(pair if per_head else pair[:1]) for pair in ([0.5, 2.0], [3.0, 0.25]))
    call = AttentionCall(0.2)
    want = ref.paged_attention(q, cache, batch, call, scales=scales)  # type: ignore[arg-type]
    together = replace(batch, shared=on_device(found))
    got = attention.decode_attention(q, cache, together, call, scales=scales, splits=splits)  # type: ignore[arg-type]
    assert_close(got, want, torch.float32)


def test_fixed_arrays_hold_any_sharing_and_none() -> None:
    """As in a recorded step: the same tensors, written anew, with rows of padding behind the step's own."""
    q, cache, batch, found = sharing([1] * 7, (8, 2, 32), torch.float32)
    rows = 10
    fixed = SharedPages(*(torch.zeros(shape, dtype=torch.int32) for shape in fixed_sizes(rows)))
    table = torch.zeros(rows, batch.page_table.shape[1], dtype=torch.int32)
    table[:7] = batch.page_table
    lens = torch.ones(rows, dtype=torch.int32)
    lens[:7] = batch.seq_lens
    padded = PagedBatch(torch.arange(rows + 1).int(), lens, table, batch.token_slots, 1, batch.max_seq_len, fixed)
    q = torch.cat((q, torch.randn(3, 8, 32)))
    cache = tuple(x.nan_to_num() for x in cache)
    call = AttentionCall(0.2)
    want = ref.paged_attention(q, cache, padded, call)
    assert_close(attention.paged_attention(q, cache, padded, call), want, torch.float32)  # nothing is shared
    nobody = [np.zeros(shape, np.int32) for shape in fixed_sizes(rows)]
    for arrays in (found.padded(rows), nobody, found.padded(rows)):
        for into, source in zip(vars_of(fixed), arrays, strict=True):
            into[tuple(slice(size) for size in source.shape)] = torch.from_numpy(source)
        assert_close(attention.paged_attention(q, cache, padded, call), want, torch.float32)


def vars_of(pages: SharedPages) -> list[torch.Tensor]:
    return [getattr(pages, name) for name in SharedPages.__slots__]


def test_rows_read_nothing_of_what_they_share_for_themselves() -> None:
    """What the rows' own kernel reads begins behind the shared pages: NaN there spoils nothing."""
    q, (k_cache, v_cache), batch, found = sharing([1] * 7, (8, 2, 32), torch.float32)
    apart = batch.page_table.clone()
    apart[2, :17] = apart[4, :17] = apart[6, :32] = 0  # a page of NaN
    assert k_cache[0].isnan().all()
    want = ref.paged_attention(q, (k_cache, v_cache), batch, AttentionCall(0.2))
    spoiled = replace(batch, page_table=apart, shared=on_device(found))
    got = attention.paged_attention(q, (k_cache, v_cache), spoiled, AttentionCall(0.2))
    assert_close(got, want, torch.float32)
