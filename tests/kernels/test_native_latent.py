"""Latent attention of the native table: what the reference says, and the same bits whatever else is in the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from linear_cases import levels
from native_support import built

from phloem.kernels import native, reference_attention
from phloem.kernels.calls import LatentCall, PagedBatch

if TYPE_CHECKING:
    from phloem.kernels.ops import Ops

pytestmark = pytest.mark.skipif(not built(), reason="the native CPU kernels are not built")
PAGE, PAGES = 16, 80
LENGTHS, NEW = [1250, 80, 5, 90], [1, 80, 5, 3]  # of the rows: two splits, a prompt, a short one, a draft
SIZES = {"even": (8, 64, 32, 128, 64), "odd": (3, 20, 10, 37, 13)}  # H, N, P, L, D


class Case:
    def __init__(self, sizes: tuple[int, ...]) -> None:
        heads, nope, rope, rank, value = sizes
        drawn = torch.Generator().manual_seed(3)
        up_HML = torch.randn(heads, nope + value, rank, generator=drawn) / rank**0.5
        self.call = LatentCall(up_HML[:, :nope], up_HML[:, nope:].transpose(1, 2), (nope + rope) ** -0.5)
        self.cache = torch.randn(4 * PAGES, 1, PAGE, rank + rope, generator=drawn).bfloat16()
        self.table = torch.randperm(4 * PAGES, generator=drawn).view(4, PAGES).int()
        q_THQ = torch.randn(sum(NEW), heads, nope + rope, generator=drawn)
        self.q = q_THQ[..., :nope], q_THQ[..., nope:]

    def rows(self, first: int, last: int) -> tuple[tuple[torch.Tensor, torch.Tensor], PagedBatch]:
        """Of these rows alone: queries, and the batch."""
        begin, new = sum(NEW[:first]), NEW[first:last]
        starts = torch.tensor([sum(new[:row]) for row in range(len(new) + 1)], dtype=torch.int32)
        lens, slots = torch.tensor(LENGTHS[first:last], dtype=torch.int32), torch.zeros(sum(new), dtype=torch.int32)
        batch = PagedBatch(starts, lens, self.table[first:last], slots, max(new), PAGES * PAGE)
        span = slice(begin, begin + sum(new))
        return (self.q[0][span], self.q[1][span]), batch


@pytest.fixture(params=SIZES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(SIZES[request.param])


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("level", levels())
def test_it_is_what_the_reference_says(case: Case, level: str, invariant: bool) -> None:
    ops, (q, batch) = native.table(2, level, invariant=invariant), case.rows(0, 4)
    want = reference_attention.latent_attention(*q, case.cache, batch, case.call)
    got = ops.latent_attention(*q, case.cache, batch, case.call)
    assert want.abs().max() > 0.5
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("invariant", [False, True])
def test_neither_other_rows_nor_threads_change_a_bit(case: Case, invariant: bool) -> None:
    def run(ops: Ops, first: int, last: int) -> torch.Tensor:
        q, batch = case.rows(first, last)
        return ops.latent_attention(*q, case.cache, batch, case.call)

    whole = run(native.table(2, invariant=invariant), 0, 4)
    assert torch.equal(run(native.table(1, invariant=invariant), 0, 4), whole)
    for row in range(4):
        begin = sum(NEW[:row])
        assert torch.equal(run(native.table(2, invariant=invariant), row, row + 1), whole[begin : begin + NEW[row]])


def test_chosen_positions_are_those_attended_to_and_all_of_them_give_the_same_bits(case: Case) -> None:
    ops, (q, batch) = native.table(2), case.rows(3, 4)
    chosen_Tk = torch.tensor([[70, 3, 12, -1], [88, 0, 41, 7], [5, -1, -1, -1]], dtype=torch.int32)
    got = ops.chosen_latent_attention(*q, case.cache, batch, case.call, chosen_Tk)
    want = reference_attention.latent_attention(*q, case.cache, batch, case.call, chosen_Tk)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    all_Tk = torch.full((3, 96), -1, dtype=torch.int32)
    for token in range(3):
        all_Tk[token, : 88 + token] = torch.arange(88 + token).flip(0)
    got = ops.chosen_latent_attention(*q, case.cache, batch, case.call, all_Tk)
    assert torch.equal(got, ops.latent_attention(*q, case.cache, batch, case.call))


def test_latents_are_written_as_the_reference_writes_them(case: Case) -> None:
    width, slots_T = case.cache.shape[3], torch.tensor([17, 3, 400], dtype=torch.int32)
    latent_TC = torch.randn(3, width + 5)[:, :width]
    ours, theirs = case.cache.clone(), case.cache.clone()
    native.table(2).write_latent(latent_TC, ours, slots_T)
    reference_attention.write_latent(latent_TC, theirs, slots_T)
    assert torch.equal(ours, theirs) and not torch.equal(ours, case.cache)


def test_a_cache_of_another_type_is_the_references(case: Case) -> None:
    q, batch = case.rows(2, 4)
    cache = case.cache.float()
    got = native.table(2).latent_attention(*q, cache, batch, case.call)
    assert torch.equal(got, reference_attention.latent_attention(*q, cache, batch, case.call))


def test_matrices_in_bfloat16_give_what_the_same_numbers_give_in_float32(case: Case) -> None:
    """To the bit: they are widened as they are read."""
    ops, (q, batch) = native.table(2), case.rows(0, 1)
    up_HML = torch.cat([case.call.w_uk, case.call.w_uv.transpose(1, 2)], 1).bfloat16()
    nope = case.call.w_uk.shape[1]
    half, whole = (
        LatentCall(up[:, :nope], up[:, nope:].transpose(1, 2), case.call.scale) for up in (up_HML, up_HML.float())
    )
    got = ops.latent_attention(*q, case.cache, batch, half)
    assert torch.equal(got, ops.latent_attention(*q, case.cache, batch, whole))
    torch.testing.assert_close(
        got, reference_attention.latent_attention(*q, case.cache, batch, whole), atol=2e-5, rtol=2e-5
    )


def test_a_recorded_step_computes_prompts_too(case: Case) -> None:
    ops, (q, batch) = native.table(2), case.rows(1, 2)
    assert ops.recorder is not None
    graph, out = ops.recorder().record(lambda: ops.latent_attention(*q, case.cache, batch, case.call))
    want = reference_attention.latent_attention(*q, case.cache, batch, case.call)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
