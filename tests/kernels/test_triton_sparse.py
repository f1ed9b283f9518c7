"""Attention to chosen keys against plain torch, under the interpreter: scores, the choice, latents, a whole model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton_support import DTYPES, assert_close, need_interpreter, paged

from phloem.kernels import reference_attention as ref
from phloem.kernels.calls import IndexCall, LatentCall, PagedBatch

need_interpreter()
from phloem.kernels.triton import sparse  # noqa: E402

CASES = [
    ([1, 1, 1], [3, 70, 131]),
    ([5, 1, 0, 19], [5, 60, 3, 90]),
    ([40, 2], [40, 200]),
]


def ascending(chosen: torch.Tensor) -> list[list[int]]:
    """Each token's positions; what stands behind the last must be -1."""
    found = [[int(one) for one in row if one >= 0] for row in chosen]
    assert all(
        row[len(have) :] == [-1] * (len(row) - len(have)) for row, have in zip(chosen.tolist(), found, strict=True)
    )
    return [sorted(row) for row in found]


def index_call(tokens: int, heads: int, size: int, count: int, dtype: torch.dtype, whole: bool) -> IndexCall:
    """Whole numbers have exact sums, and many that are equal."""
    q = torch.randint(-2, 3, (tokens, heads + 1, size)) if whole else torch.randn(tokens, heads + 1, size)
    weights = torch.randint(-2, 3, (tokens, heads)) if whole else torch.randn(tokens, heads)
    return IndexCall(q.to(dtype)[:, :heads], torch.empty(0), weights.to(dtype), count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "lengths"), CASES)
@pytest.mark.parametrize(("heads", "size", "count"), [(2, 16, 4), (5, 24, 64), (3, 8, 300)])
@pytest.mark.parametrize("most", [sparse.MOST_SCORES, 1000])
def test_choice_of_equals(
    queries: list[int], lengths: list[int], heads: int, size: int, count: int, most: int, dtype: torch.dtype
) -> None:
    """Scores of whole numbers: the choice is the reference's, position by position; of equals the lowest. `most`: for
    all tokens at once, and for few after others."""
    batch, cache, _ = paged(queries, lengths, 16, 1, size, dtype)
    cache = torch.where(cache.isnan(), cache, (cache * 1.5).round())
    call = index_call(sum(queries), heads, size, count, dtype, True)
    got = sparse.choose_keys(call, cache, batch, most)
    assert got.dtype == torch.int32 and got.shape == (sum(queries), count)
    assert ascending(got) == ascending(ref.choose_keys(call, cache, batch))
    assert all(row == sorted(row) for row in ([p for p in one if p >= 0] for one in got.tolist()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(dtype: torch.dtype) -> None:
    """Each that is looked at, of any numbers; what is chosen scores no less than what is not, but for rounding."""
    queries, lengths, count = [7, 1, 30], [50, 140, 90], 20
    batch, cache, _ = paged(queries, lengths, 16, 1, 40, dtype)
    call = index_call(38, 4, 40, count, dtype, False)
    chosen, at = ascending(sparse.choose_keys(call, cache, batch)), 0
    for row, (new, length) in enumerate(zip(queries, lengths, strict=True)):
        keys = cache[batch.page_table[row, : -(-length // 16)].long(), 0].flatten(0, 1)[:length]
        scores = ref.index_scores(call.q[at : at + new], keys, call.weights[at : at + new])
        for j in range(new):
            seen = length - new + j + 1
            taken = torch.zeros(seen, dtype=torch.bool)
            taken[chosen[at + j]] = True
            assert int(taken.sum()) == min(seen, count)
            if seen > count:
                assert scores[j, :seen][taken].min() >= scores[j, :seen][~taken].max() - 1e-4
        at += new


def test_both_zeros_are_one_and_the_best_are_found_among_any_floats() -> None:
    """Of one head without keys: heads that see nothing give -0.0 where their weight is below 0."""
    batch, cache, _ = paged([1], [300], 16, 1, 16, torch.float32)
    cache = torch.where(cache.isnan(), cache, cache * 10.0 ** torch.randint(-30, 15, cache.shape[:3])[..., None])
    call = IndexCall(torch.eye(16)[None, :2], torch.empty(0), torch.tensor([[1.0, -1.0]]), 100)
    assert ascending(sparse.choose_keys(call, cache, batch)) == ascending(ref.choose_keys(call, cache, batch))
    keys = -cache.abs()  # nothing is above 0: all are 0.0 or -0.0
    assert ascending(sparse.choose_keys(call, keys, batch)) == [list(range(100))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "lengths"), CASES)
@pytest.mark.parametrize(("heads", "latent", "rope", "splits"), [(3, 20, 8, None), (17, 32, 16, 3), (70, 16, 24, 2)])
def test_attention_to_chosen_keys(
    queries: list[int], lengths: list[int], heads: int, latent: int, rope: int, splits: int | None, dtype: torch.dtype
) -> None:
    batch, cache, _ = paged(queries, lengths, 16, 1, latent + rope, dtype)
    tokens, nope, size = sum(queries), 12, 10
    call = LatentCall(torch.randn(heads, nope, latent) * 0.3, torch.randn(heads, latent, size) * 0.3, 0.2)
    q_nope, q_rope = torch.randn(tokens, heads, nope + rope).to(dtype).split([nope, rope], -1)
    index = index_call(tokens, 2, latent + rope, 32, dtype, True)
    chosen = ref.choose_keys(index, torch.where(cache.isnan(), 0.0, cache), batch)
    got = sparse.chosen_latent_attention(q_nope, q_rope, cache, batch, call, chosen, splits)
    want = ref.latent_attention(q_nope, q_rope, torch.where(cache.isnan(), 0.0, cache), batch, call, chosen)
    assert got.shape == (tokens, heads, size)
    assert_close(got, want, dtype)


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_latents_are_written(kept: torch.dtype) -> None:
    """Of a strided view; what 8 bits cannot hold is cut off. Whole numbers: the interpreter rounds others wrongly."""
    cache = torch.zeros(5, 1, 16, 40).to(kept)
    latents = torch.randint(-8, 9, (4, 50)).float()[:, 3:43]
    latents[0, 0], latents[1, 1] = 1e4, -1e4
    slots = torch.tensor([3, 79, 16, 40], dtype=torch.int32)
    want = cache.clone()
    ref.write_latent(latents, want, slots)
    sparse.write_latent(latents, cache, slots)
    assert torch.equal(cache.float(), want.float())
    sparse.write_latent(latents[:0], cache, slots[:0])


def test_nothing_is_no_launch() -> None:
    batch = PagedBatch(
        *(torch.zeros(n, dtype=torch.int32) for n in (1, 0)), torch.zeros(0, 1).int(), torch.zeros(0).int(), 0, 0
    )
    call = index_call(0, 2, 16, 8, torch.float32, False)
    assert sparse.choose_keys(call, torch.zeros(1, 1, 16, 16), batch).shape == (0, 8)


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_whole_models_write_the_same(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiny checkpoints that choose fewer keys than they have, on a table with these ops: prompts, decoding."""
    pytest.importorskip("transformers")
    from model_support import PROMPT, Engine

    from phloem.kernels.ops import Ops
    from phloem.testing.checkpoints import tiny_checkpoint

    path = tiny_checkpoint(name, tmp_path_factory.mktemp(name))
    plain = Engine(path)
    ops = {key: getattr(sparse, key) for key in ("write_latent", "choose_keys", "chosen_latent_attention")}
    mine = Engine(path, ops=replace(Ops(), **ops))
    torch.testing.assert_close(mine.whole(PROMPT), plain.whole(PROMPT), atol=1e-4, rtol=1e-4)
    assert mine.greedy(PROMPT, 2) == plain.greedy(PROMPT, 2)


def test_checks_for_a_device_pass_here() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import gpu_kernels_scan
    from gpu_kernels import Kernels, distance

    kernels = Kernels(torch.device("cpu"), torch.float32, True)
    for name, check in gpu_kernels_scan.CHECKS.items():
        assert max(distance(got, want) for got, want in check(kernels)) < 1e-4, name
