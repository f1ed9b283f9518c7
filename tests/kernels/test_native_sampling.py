"""The native sampler against `engine/sampling/sampler.py`, and the scans that it is made of against torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from phloem.core.request import SamplingParams
from phloem.engine.sampling.sampler import SamplingRows
from phloem.engine.sampling.sampler import sample as torch_sample
from phloem.kernels import native
from phloem.kernels import reference as ref
from phloem.kernels.ops import Draw, Ops


def levels() -> list[str]:
    try:
        return list(native.runtime().library.levels())
    except native.Unavailable:
        return []


pytestmark = pytest.mark.skipif(not levels(), reason="the native library is not built (no C++ compiler?)")


@pytest.fixture(params=[(level, threads) for level in levels() for threads in (1, 2)], ids=str)
def ops(request: Any) -> Iterator[Ops]:
    level, threads = request.param
    yield native.table(threads, level)
    native.runtime().library.set_level(None)


VOCABS = [1, 5, 16, 63, 1000, 49152]


@pytest.mark.parametrize("vocab", VOCABS)
def test_scans(ops: Ops, vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(5, vocab + 3) * 5)[:, :vocab]
    logits[1] = logits[1].round()  # ties
    logits[2, vocab // 2 :] = float("-inf")
    logits[3] = float("-inf")
    first = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert ops.argmax(logits).tolist() == first
    torch.testing.assert_close(ops.logsumexp(logits), ref.logsumexp(logits), rtol=1e-6, atol=1e-6)
    for k in {1, min(5, vocab), min(700, vocab)}:
        values, ids = ops.top_k(logits, k)
        assert torch.equal(values, logits.topk(k).values)
        assert torch.equal(logits.gather(1, ids.long()), values) and all(len(set(row)) == k for row in ids.tolist())


def test_not_a_number_is_found(ops: Ops) -> None:
    logits = torch.randn(2, 300)
    logits[0, 77] = logits[0, 200] = float("nan")
    logits[1, 50] = float("inf")
    assert ops.argmax(logits).tolist() == [77, 50]
    assert draw(ops, logits, SamplingParams(temperature=1.0, top_p=0.5)).tolist() == [77, 50]
    assert ops.logsumexp(logits)[0].isnan() and ops.logsumexp(logits)[1] == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("vocab,words", [(5, 1), (64, 2), (1000, 32), (1000, 20)])
def test_mask(ops: Ops, vocab: int, words: int) -> None:
    torch.manual_seed(vocab)
    got = torch.randn(4, vocab + 1)[:, :vocab]
    want = got.clone()
    rows = torch.tensor([3, 1], dtype=torch.int32)
    mask = torch.randint(-(2**31), 2**31, (2, words)).to(torch.int32)
    mask[0, 0] = -1
    ops.mask_tokens_(got, rows, mask)
    ref.mask_tokens_(want, rows, mask)
    assert torch.equal(got, want) and (got[1] == float("-inf")).any()


def columns(params: list[SamplingParams], seed: int) -> tuple[torch.Tensor, ...]:
    count = len(params)
    return (
        torch.tensor([p.temperature for p in params], dtype=torch.float32),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params], dtype=torch.float32),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
        torch.arange(count) * 12345 + seed,
        torch.arange(count) + 7,
    )


def draw(ops: Ops, logits: torch.Tensor, *params: SamplingParams, seed: int = 0) -> torch.Tensor:
    assert ops.sample is not None
    every = list(params) * (len(logits) // len(params))
    return ops.sample(logits, Draw(*columns(every, seed)))


FILTERS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=1),
    SamplingParams(temperature=1.3, top_k=50),
    SamplingParams(temperature=1.0, top_k=900),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=2.0, top_p=0.3),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95),
    SamplingParams(temperature=1.0, top_k=300, top_p=0.5, min_p=0.2),
    SamplingParams(temperature=1.0, top_p=1e-9),
]


@pytest.mark.some(20)
@pytest.mark.parametrize("vocab", [2, 63, 1000, pytest.param(49152, marks=pytest.mark.slow)])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_draws_are_those_of_the_specification(ops: Ops, vocab: int, spread: float) -> None:
    torch.manual_seed(vocab)
    for params in FILTERS:
        logits = torch.randn(24, vocab) * spread
        got = draw(ops, logits, params).tolist()
        seeds, positions = [i * 12345 for i in range(24)], list(range(7, 31))
        rows = SamplingRows.of([params] * 24, seeds, positions, vocab)
        want = torch_sample(logits, rows, Ops()).tolist()
        # A draw that falls on a border within rounding may go to the neighbour.
        assert sum(a != b for a, b in zip(got, want, strict=True)) <= (1 if vocab > 100 else 0), params


@pytest.mark.parametrize("params", FILTERS[1:], ids=str)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    ops, vocab, count = native.table(2), 40, 20000
    torch.manual_seed(3)
    logits = torch.randn(1, vocab) * 2
    weights = torch.softmax(logits[0].double() / params.temperature, -1)
    best, order = weights.sort(descending=True)
    if params.top_k > 0:
        best[params.top_k :] = 0
    best[(best.cumsum(0) - best) >= params.top_p * best.sum()] = 0
    best[0] = weights.max()
    best[best < params.min_p * best[0]] = 0
    want = torch.zeros(vocab, dtype=torch.float64).scatter_(0, order, best / best.sum())
    got = torch.bincount(draw(ops, logits.expand(count, vocab), params), minlength=vocab) / count
    assert ((got > 0) <= (want > 0)).all()
    assert (got - want).abs().max() < 5 * float(np.sqrt(0.25 / count))


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(1, 5000)
    params = SamplingParams(temperature=1.0, top_p=0.99)
    one = native.table(1)
    alone = draw(one, logits, params, seed=-5)
    together = draw(native.table(2), logits.expand(8, -1), params, seed=-5)
    assert together[0] == alone[0] and len(set(together.tolist())) > 1


def test_masked_rows_never_give_a_forbidden_token(ops: Ops) -> None:
    torch.manual_seed(0)
    logits = torch.full((50, 3000), float("-inf"))
    allowed = torch.tensor([5, 1024, 2999])
    logits[:, allowed] = torch.randn(50, 3)
    for params in FILTERS:
        assert torch.isin(draw(ops, logits, params).long(), allowed).all()


def test_wrong_arguments_are_refused(ops: Ops) -> None:
    logits = torch.randn(2, 8)
    with pytest.raises(ValueError, match="logits must be float32"):
        ops.argmax(logits.double())
    with pytest.raises(ValueError, match="k must be"):
        ops.top_k(logits, 9)
    with pytest.raises(ValueError, match="expected contiguous"):
        draw(ops, logits, *[SamplingParams()] * 1 + [SamplingParams()] * 2)
    with pytest.raises(ValueError, match="mask rows"):
        ops.mask_tokens_(logits, torch.tensor([2], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32))
