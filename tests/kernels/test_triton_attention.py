"""Paged attention kernels against plain torch, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from triton_support import DTYPES, assert_close, need_interpreter, paged

from phloem.kernels import reference_attention as ref
from phloem.kernels.calls import AttentionCall, LatentCall

need_interpreter()
from phloem.kernels.triton import attention, invariant, mla  # noqa: E402

DECODE = [
    # rows' lengths, page size, H, K, D, window, soft cap, sinks
    ([5, 70, 131], 16, 8, 2, 32, 0, 0.0, False),
    ([1, 33, 150], 8, 7, 1, 24, 40, 5.0, True),
    ([64, 65], 1, 2, 2, 16, 0, 0.0, True),
    ([200], 64, 12, 4, 80, 33, 0.0, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DECODE)
def test_decode(case: tuple, dtype: torch.dtype) -> None:
    lengths, page, heads, kv_heads, head, window, cap, sunk = case
    torch.manual_seed(0)
    batch, k_cache, v_cache = paged([1] * len(lengths), lengths, page, kv_heads, head, dtype)
    q = torch.randn(len(lengths), heads, head).to(dtype)
    sinks = torch.randn(heads) if sunk else None
    arguments = (q, (k_cache, v_cache), batch, AttentionCall(head**-0.5, window, cap, sinks))
    want = ref.paged_attention(*arguments)
    assert_close(attention.paged_attention(*arguments), want, dtype)
    assert_close(attention.decode_attention(*arguments, splits=1), want, dtype)
    assert_close(attention.decode_attention(*arguments, splits=3), want, dtype)
    assert_close(attention.decode_attention(*arguments, split_size=64), want, dtype)


EXTEND = [
    # new tokens, lengths, page size, H, K, D, window, soft cap, sinks
    ([3, 1, 40], [10, 5, 100], 16, 4, 2, 32, 0, 0.0, True),
    ([70, 2], [75, 2], 4, 3, 3, 16, 9, 3.0, False),
    ([130], [130], 16, 8, 2, 16, 50, 0.0, True),
    ([1, 1, 33, 1], [20, 1, 33, 90], 8, 6, 2, 40, 0, 0.0, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EXTEND)
def test_extend(case: tuple, dtype: torch.dtype) -> None:
    queries, lengths, page, heads, kv_heads, head, window, cap, sunk = case
    torch.manual_seed(1)
    batch, k_cache, v_cache = paged(queries, lengths, page, kv_heads, head, dtype)
    q = torch.randn(sum(queries), heads, head).to(dtype)
    sinks = torch.randn(heads) if sunk else None
    arguments = (q, (k_cache, v_cache), batch, AttentionCall(head**-0.5, window, cap, sinks))
    assert_close(attention.paged_attention(*arguments), ref.paged_attention(*arguments), dtype)


def test_strided_queries_and_wider_values() -> None:
    batch, k_cache, v_cache = paged([2, 5], [7, 30], 8, 2, 16, torch.float32, head_v=24)
    fused = torch.randn(7, 4 * 16 + 40)
    q = fused[:, : 4 * 16].unflatten(1, (4, 16))
    want = ref.paged_attention(q, (k_cache, v_cache), batch, AttentionCall(0.3))
    assert_close(attention.extend_attention(q, (k_cache, v_cache), batch, AttentionCall(0.3)), want, torch.float32)


@pytest.mark.parametrize("window", [0, 12])
def test_tree_mask(window: int) -> None:
    torch.manual_seed(2)
    queries, lengths = [5, 3, 1], [25, 70, 9]
    batch, k_cache, v_cache = paged(queries, lengths, 16, 2, 16, torch.float32)
    q = torch.randn(9, 4, 16)
    # Each draft token sees itself and a random set of those before it.
    mask = torch.zeros(9, 5, dtype=torch.bool)
    for row, (begin, count) in enumerate([(0, 5), (5, 3), (8, 1)]):
        for token in range(count):
            mask[begin + token, :token] = torch.rand(token) > 0.5
            mask[begin + token, token] = True
        assert batch.query_start[row] == begin
    want = ref.paged_attention(q, (k_cache, v_cache), batch, AttentionCall(0.25, window), tree_mask=mask)
    got = attention.extend_attention(q, (k_cache, v_cache), batch, AttentionCall(0.25, window), tree_mask=mask)
    assert_close(got, want, torch.float32)
    assert (got - ref.paged_attention(q, (k_cache, v_cache), batch, AttentionCall(0.25, window))).abs().max() > 0.01


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("queries", [[1, 1], [6, 1]])
def test_float8_cache(per_head: bool, queries: list[int]) -> None:
    torch.manual_seed(3)
    batch, k_cache, v_cache = paged(queries, [9, 40], 8, 2, 32, torch.float32)
    k8, v8 = (x.nan_to_num().to(torch.float8_e4m3fn) for x in (k_cache, v_cache))
    scales = (
        (torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.25]))
        if per_head
        else (torch.tensor([0.7]), torch.tensor([1.5]))
    )
    q = torch.randn(sum(queries), 6, 32)
    want = ref.paged_attention(q, (k8, v8), batch, AttentionCall(0.2), scales=scales)
    run = attention.decode_attention if max(queries) == 1 else attention.extend_attention
    assert_close(run(q, (k8, v8), batch, AttentionCall(0.2), scales=scales), want, torch.float32)


def test_invariant_attention_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariant, "SPLIT_TOKENS", 64)
    batch, k_cache, v_cache = paged([1, 1, 1], [150, 20, 300], 16, 2, 16, torch.float32)
    q = torch.randn(3, 4, 16)
    together = invariant.paged_attention(q, (k_cache, v_cache), batch, AttentionCall(0.25))
    for row in range(3):
        alone = type(batch)(
            torch.tensor([0, 1]).int(),
            batch.seq_lens[row : row + 1],
            batch.page_table[row : row + 1],
            batch.token_slots[row : row + 1],
            1,
            int(batch.seq_lens[row]),
        )
        one = invariant.paged_attention(q[row : row + 1], (k_cache, v_cache), alone, AttentionCall(0.25))
        assert torch.equal(one[0], together[row])


def test_invariant_extend_does_not_depend_on_the_chunk() -> None:
    """The same tokens computed in one chunk or in two attend alike, bit for bit."""
    batch, k_cache, v_cache = paged([40], [90], 16, 2, 16, torch.float32)
    q = torch.randn(40, 4, 16)
    whole = invariant.paged_attention(q, (k_cache, v_cache), batch, AttentionCall(0.25))
    first = type(batch)(
        torch.tensor([0, 23]).int(), torch.tensor([73]).int(), batch.page_table, batch.token_slots[:23], 23, 73
    )
    part = invariant.paged_attention(q[:23], (k_cache, v_cache), first, AttentionCall(0.25))
    assert torch.equal(part, whole[:23])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "splits"), [([1, 1], None), ([1, 1], 3), ([5, 1, 9], None)])
def test_mla(queries: list[int], splits: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    heads, nope, rope, latent, value = 5, 16, 8, 32, 24
    lengths = [40, 75, 9][: len(queries)]
    batch, cache, _ = paged(queries, lengths, 8, 1, latent + rope, dtype)
    tokens = sum(queries)
    q_nope, q_rope = torch.randn(tokens, heads, nope).to(dtype), torch.randn(tokens, heads, rope).to(dtype)
    w_uk, w_uv = (torch.randn(heads, nope, latent) / 4).to(dtype), (torch.randn(heads, latent, value) / 4).to(dtype)
    call = LatentCall(w_uk, w_uv, 0.2)
    want = ref.latent_attention(q_nope, q_rope, cache, batch, call)
    got = mla.latent_attention(q_nope, q_rope, cache, batch, call, splits)
    assert got.is_contiguous()  # heads are viewed as features
    torch.testing.assert_close(got.float(), want.float(), atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=2e-2)
    assert got.is_contiguous()  # a layer takes all heads of a token as one row
