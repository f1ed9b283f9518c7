"""Native paged attention against the reference: ragged rows, grouped heads, windows, caps, sinks, all cache types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import int8_pages
import pytest
import torch
from linear_cases import cases, needs_native

from phloem.kernels import native
from phloem.kernels import reference_attention as ref
from phloem.kernels.graph import check_replay
from phloem.kernels.ops import AttentionCall, Ops, PagedBatch

pytestmark = needs_native
KINDS = [torch.bfloat16, torch.int8, torch.float32]


@pytest.fixture(params=cases(1, 2))
def ops(request: Any) -> Iterator[Ops]:
    level, threads = request.param
    yield native.table(threads, level)
    native.runtime().library.set_level(None)


def make_batch(queries: list[int], lengths: list[int], page_size: int, spare: int = 0) -> tuple[PagedBatch, int]:
    """Rows with shuffled pages; page 0 is scratch. Gives the batch and the number of pages."""
    counts = [-(-length // page_size) for length in lengths]
    ids = (torch.randperm(sum(counts)) + 1).to(torch.int32)
    table = torch.zeros(len(lengths), max(counts) + spare, dtype=torch.int32)
    taken = 0
    for row, count in enumerate(counts):
        table[row, :count] = ids[taken : taken + count]
        taken += count
    start = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    slots = torch.zeros(sum(queries), dtype=torch.int32)
    return PagedBatch(start, lens, table, slots, max(queries), max(lengths)), sum(counts) + 1


def quantise(cache: torch.Tensor, keys: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 cache as int8 pages, and as the float32 values that these stand for."""
    scale = cache.abs().amax(-1, keepdim=True) / 127
    values = (cache / scale).round().clamp(-127, 127)
    return int8_pages.pack(values, scale, keys), values * scale


def caches_of(kind: torch.dtype, k: torch.Tensor, v: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Float32 keys and values as caches of a type, and as the float32 values that these stand for."""
    if kind is torch.int8:
        (k8, k), (v8, v) = quantise(k, True), quantise(v, False)
        return [k8, v8], [k, v]
    caches = [k.to(kind), v.to(kind)]
    return caches, [cache.float() for cache in caches]


CASES = {
    "decode": ([1, 1, 1, 1], [1, 37, 300, 64], 9, 3, 64, 16),
    "long decode, splits": ([1, 1], [5000, 513], 3, 1, 64, 16),
    "wide group": ([1, 1, 1], [7, 700, 70], 8, 1, 128, 16),
    "odd head size": ([1, 5, 1], [9, 40, 300], 4, 2, 72, 8),
    "tiny odd head": ([1, 3], [5, 70], 2, 2, 5, 3),
    "extend": ([70, 1, 33, 2], [70, 200, 97, 300], 9, 3, 64, 16),
    "extend, odd everything": ([67, 13], [131, 13], 6, 2, 80, 1),
    "mixed step": ([1] * 9 + [50] + [1] * 8, [*range(90, 99), 60, *range(280, 288)], 9, 3, 64, 16),
    "no grouping": ([1, 20], [130, 20], 5, 5, 32, 7),
}


def run(ops: Ops, case: str, kind: torch.dtype, window: int, cap: float, sinks: bool, block: int = 0) -> None:
    torch.manual_seed(len(case))
    queries, lengths, heads, kv_heads, size, page_size = CASES[case]
    if kind is torch.int8:  # which takes multiples of 4
        size, page_size = -(-size // 4) * 4, -(-page_size // 4) * 4
    batch, pages = make_batch(queries, lengths, page_size)
    fused = torch.randn(sum(queries), heads * size + 5) * 1.5
    q = fused[:, : heads * size].unflatten(-1, (heads, size))
    k, v = (torch.randn(pages, kv_heads, page_size, size) for _ in "kv")
    caches, exact = caches_of(kind, k, v)
    sink = torch.randn(heads) if sinks else None
    scale = size**-0.5
    call = AttentionCall(scale, window, cap, sink, block=block)
    got = ops.paged_attention(q, tuple(caches), batch, call)
    want = ref.paged_attention(q, tuple(exact), batch, call)
    assert got.shape == want.shape
    # AVX-512 rounds queries and weights to 8 bits: of a mantissa, or (int8) of what is largest in a row. AVX2 rounds
    # them, beside int8 caches alone, so that four of them fit a word. Beside float32 ones none does.
    fours = (2e-5, 8e-2)
    rounds = {"avx512": (2e-2, 4e-2), "amx": (2e-2, 4e-2), "avx2": fours, "avxvnni": fours}
    rounded = rounds.get(native.runtime().library.level(), (2e-5, 2e-5))
    tolerance = 2e-5 if kind is torch.float32 else rounded[kind is torch.int8]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert (got - want).pow(2).mean().sqrt() < tolerance / 8


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "int8", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(ops: Ops, case: str, kind: torch.dtype) -> None:
    run(ops, case, kind, 0, 0.0, False)


@pytest.mark.parametrize("case", ["decode", "wide group", "extend", "tiny odd head"])
@pytest.mark.parametrize("window,cap,sinks", [(1, 0.0, False), (50, 0.0, True), (16, 5.0, False), (0, 3.0, True)])
@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "int8", "f32"])
def test_window_cap_and_sinks(ops: Ops, case: str, kind: torch.dtype, window: int, cap: float, sinks: bool) -> None:
    run(ops, case, kind, window, cap, sinks)


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "int8", "f32"])
@pytest.mark.parametrize("block", [4, 32, 100])
@pytest.mark.parametrize("case", ["decode", "extend", "mixed step", "extend, odd everything"])
def test_causal_by_blocks(ops: Ops, case: str, kind: torch.dtype, block: int) -> None:
    run(ops, case, kind, 0, 3.0 if block == 4 else 0.0, block == 32, block)


def test_blocks_in_a_window_and_chunks_are_refused(ops: Ops) -> None:
    batch, pages = make_batch([3], [9], 16)
    q, k = torch.randn(3, 4, 64), torch.zeros(pages, 2, 16, 64).bfloat16()
    for call in (AttentionCall(0.1, window=4, block=4), AttentionCall(0.1, chunk=4), AttentionCall(0.1, causal=False)):
        with pytest.raises(ValueError, match="causal, or causal by blocks"):
            ops.paged_attention(q, (k, k), batch, call)


def test_streamed_decode_is_precise(ops: Ops) -> None:
    """One query token of few heads: nothing is rounded, or (AVX-512) the weights alone, to 8 bits."""
    torch.manual_seed(0)
    batch, pages = make_batch([1, 1], [400, 77], 16)
    q, k, v = torch.randn(2, 9, 64), torch.randn(pages, 3, 16, 64).bfloat16(), torch.randn(pages, 3, 16, 64).bfloat16()
    got = ops.paged_attention(q, (k, v), batch, AttentionCall(0.125))
    tolerance = 2e-3 if native.runtime().library.level() in ("avx512", "amx") else 1e-5
    want = ref.paged_attention(q, (k, v), batch, AttentionCall(0.125))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "int8", "f32"])
def test_results_do_not_depend_on_threads_or_neighbours(kind: torch.dtype) -> None:
    torch.manual_seed(1)
    queries, lengths = [1, 40, 1, 7, *[1] * 16], [900, 60, 3, 300, *range(70, 86)]
    batch, pages = make_batch(queries, lengths, 16)
    q = torch.randn(sum(queries), 6, 64)
    k, v = caches_of(kind, torch.randn(pages, 2, 16, 64), torch.randn(pages, 2, 16, 64))[0]
    args = (0.125, 0, 0.0, None)
    one = native.table(1).paged_attention(q, (k, v), batch, AttentionCall(*args))
    ops = native.table(3)
    assert torch.equal(ops.paged_attention(q, (k, v), batch, AttentionCall(*args)), one)
    native.table(2)
    alone = PagedBatch(
        torch.tensor([0, 1], dtype=torch.int32), batch.seq_lens[:1], batch.page_table[:1], batch.token_slots, 1, 900
    )
    assert torch.equal(ops.paged_attention(q[:1], (k, v), alone, AttentionCall(*args)), one[:1])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_padding_rows_give_zeros_and_a_recorded_step_follows_the_lengths(kind: torch.dtype) -> None:
    torch.manual_seed(2)
    ops = native.table(2)
    batch, pages = make_batch([1, 1, 1], [900, 16, 40], 16)
    k, v = (torch.randn(pages, 2, 16, 64).to(kind) for _ in "kv")
    q = torch.randn(3, 6, 64)

    def step() -> torch.Tensor:
        return ops.paged_attention(q, (k, v), batch, AttentionCall(0.125))

    assert ops.recorder is not None
    graph, result = ops.recorder().record(step)
    for lengths in ([1, 16, 2], [800, 0, 17], [900, 16, 40]):
        batch.seq_lens.copy_(torch.tensor(lengths))
        check_replay(graph, [result], lambda: [step()])
        for row, length in enumerate(lengths):
            assert (result[row] == 0).all() == (length == 0)


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "int8", "f32"])
def test_not_a_number_is_not_hidden(ops: Ops, kind: torch.dtype) -> None:
    batch, pages = make_batch([1, 5, 1], [70, 9, 30], 16)
    q = torch.randn(7, 4, 32)
    k, v = caches_of(kind, torch.randn(pages, 2, 16, 32), torch.randn(pages, 2, 16, 32))[0]
    q[0, 1, 5] = q[3, 0, 0] = float("nan")
    got = ops.paged_attention(q, (k, v), batch, AttentionCall(0.2)).isnan().all(-1)
    want = torch.zeros(7, 4, dtype=torch.bool)
    want[0, 1] = want[3, 0] = True
    assert torch.equal(got, want)


def test_what_an_earlier_owner_left_in_an_int8_page_changes_nothing(ops: Ops) -> None:
    """Tokens behind a row's last one, whose scales may be anything; a scale of the row itself that is NaN shows."""
    torch.manual_seed(3)
    batch, pages = make_batch([1, 6], [37, 20], 16)
    q, k, v = torch.randn(7, 4, 32), torch.randn(pages, 2, 16, 32), torch.randn(pages, 2, 16, 32)
    want = ops.paged_attention(q, (quantise(k, True)[0], quantise(v, False)[0]), batch, AttentionCall(0.2))
    for row, (page, slot) in enumerate([(2, 5), (1, 4)]):
        k[batch.page_table[row, page], :, slot:] = float("nan")
        v[batch.page_table[row, page], :, slot:] = float("inf")
    spoilt = [quantise(k, True)[0], quantise(v, False)[0]]
    assert torch.equal(ops.paged_attention(q, tuple(spoilt), batch, AttentionCall(0.2)), want)
    v[batch.page_table[0, 0], :, 3] = float("nan")
    got = ops.paged_attention(q, (spoilt[0], quantise(v, False)[0]), batch, AttentionCall(0.2))
    assert got[0].isnan().all() and torch.equal(got[1:], want[1:])


def test_what_an_earlier_owner_left_in_a_float32_page_is_not_read(ops: Ops) -> None:
    torch.manual_seed(3)
    batch, pages = make_batch([1, 6], [37, 20], 16)
    q, k, v = torch.randn(7, 4, 32), torch.randn(pages, 2, 16, 32), torch.randn(pages, 2, 16, 32)
    want = ops.paged_attention(q, (k, v), batch, AttentionCall(0.2))
    for row, (page, slot) in enumerate([(2, 5), (1, 4)]):
        for cache in (k, v):
            cache[batch.page_table[row, page], :, slot:] = float("nan")
    assert torch.equal(ops.paged_attention(q, (k, v), batch, AttentionCall(0.2)), want)


@pytest.mark.parametrize("shape", [(1, 3, 12), (1, 4, 9)])
def test_int8_refuses_what_is_no_multiple_of_four(ops: Ops, shape: tuple[int, int, int]) -> None:
    batch, pages = make_batch([1], [5], shape[1])
    cache, heads = torch.zeros(pages, *shape, dtype=torch.int8), torch.randn(1, 2, shape[2] - 4)
    with pytest.raises(ValueError, match="multiples of 4"):
        ops.paged_attention(heads, (cache, cache), batch, AttentionCall(1.0))
    with pytest.raises(ValueError, match="multiples of 4"):
        ops.write_kv(heads[:, :1], heads[:, :1], cache, cache, torch.tensor([0], dtype=torch.int32))


def test_wrong_arguments_are_refused() -> None:
    ops = native.table(2)
    batch, pages = make_batch([1], [5], 4)
    q, cache = torch.randn(1, 2, 8), torch.zeros(pages, 1, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="does not fit"):
        ops.paged_attention(q, (cache.half(), cache.half()), batch, AttentionCall(1.0))
    with pytest.raises(ValueError, match="does not fit"):
        ops.paged_attention(q[..., :6], (cache, cache), batch, AttentionCall(1.0))
    with pytest.raises(ValueError, match="contiguous"):
        turned = torch.zeros(pages, 4, 2, 8, dtype=torch.bfloat16).transpose(1, 2)
        ops.paged_attention(q, (turned, turned), batch, AttentionCall(1.0))
    batch.seq_lens = batch.seq_lens.long()
    with pytest.raises(TypeError, match="int32"):
        ops.paged_attention(q, (cache, cache), batch, AttentionCall(1.0))


SHARED = {
    # Query tokens, cached tokens, heads, kv heads; for a row another, and how many tokens they have in common.
    "groups": ([1] * 6, [600, 1300, 700, 1310, 90, 1300], 9, 3, {2: (0, 512), 3: (1, 1040), 4: (0, 80), 5: (1, 300)}),
    "a lone part": ([1, 1], [1024, 1024], 4, 2, {1: (0, 1024)}),
    "beside a prompt": ([40, 1, 1, 3], [900, 901, 905, 800], 6, 2, {1: (0, 880), 2: (1, 896), 3: (1, 640)}),
    "more than fit": ([1] * 30, [540 + i for i in range(30)], 8, 1, {i: (0, 528) for i in range(1, 30)}),
    "longer splits": ([1, 1, 1], [9000, 9100, 4200], 2, 2, {1: (0, 8960), 2: (0, 4096)}),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "int8", "f32"])
def test_rows_that_share_pages(ops: Ops, case: str, kind: torch.dtype) -> None:
    """To the bits that each row has alone, and near the reference."""
    torch.manual_seed(len(case))
    queries, lengths, heads, kv_heads, same = SHARED[case]
    batch, pages = make_batch(queries, lengths, 16)
    for row, (leader, tokens) in same.items():
        batch.page_table[row, : tokens // 16] = batch.page_table[leader, : tokens // 16]
    q, k, v = torch.randn(sum(queries), heads, 32), *(torch.randn(pages, kv_heads, 16, 32) for _ in "kv")
    caches, exact = caches_of(kind, k, v)
    got = ops.paged_attention(q, tuple(caches), batch, AttentionCall(32**-0.5))
    torch.testing.assert_close(
        got, ref.paged_attention(q, tuple(exact), batch, AttentionCall(32**-0.5)), rtol=4e-2, atol=4e-2
    )
    at = 0
    for row, count in enumerate(queries):
        part = slice(row, row + 1)
        alone = PagedBatch(
            torch.tensor([0, count], dtype=torch.int32), batch.seq_lens[part], batch.page_table[part],
            batch.token_slots[at : at + count], count, lengths[row],
        )  # fmt: skip
        want = ops.paged_attention(q[at : at + count], tuple(caches), alone, AttentionCall(32**-0.5))
        assert torch.equal(got[at : at + count], want), row
        at += count
