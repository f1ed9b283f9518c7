"""Sampling without a host sync against plain torch, under the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_support import need_interpreter

from phloem.engine.sampling import sampler as engine_sampler
from phloem.kernels import reference_sampling as reference
from phloem.kernels.calls import Draw

need_interpreter()
from phloem.kernels.triton import sample  # noqa: E402


def _columns(rows: int, **values: list[float]) -> list[torch.Tensor]:
    """temperature, top_k, top_p, min_p, seeds, positions of `rows` rows; off where not given."""
    default = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0}
    columns = [torch.tensor(values.get(name, [value] * rows)) for name, value in default.items()]
    columns[1] = columns[1].int()
    seeds = torch.tensor(values.get("seeds", list(range(11, 11 + rows)))).long()
    return [c.float() if c.is_floating_point() else c for c in columns] + [seeds, torch.arange(rows) * 7]


CASES = {
    "plain": {},
    "greedy": {"temperature": [0.0] * 4},
    "top_k_1": {"top_k": [1] * 4},
    "temperature": {"temperature": [0.1, 0.7, 1.5, 100.0]},
    "top_k": {"top_k": [2, 5, 50, 4999]},
    "top_p": {"top_p": [0.05, 0.5, 0.9, 0.999]},
    "min_p": {"min_p": [0.01, 0.3, 0.9, 1.0]},
    "all": {
        "temperature": [0.8, 1.2, 0.0, 2.0],
        "top_k": [40, 7, 5, 300],
        "top_p": [0.9, 0.6, 0.5, 0.8],
        "min_p": [0.02, 0.0, 0.0, 0.1],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_sample(name: str) -> None:
    torch.manual_seed(5)
    logits = torch.randn(4, 5001) * 3
    columns = _columns(4, **CASES[name])
    assert torch.equal(sample.sample(logits, Draw(*columns)), reference.sample(logits, Draw(*columns)))


def test_half_precision_logits() -> None:
    logits = torch.randn(3, 500).half()
    columns = _columns(3, top_k=[-1, 9, 3])
    assert torch.equal(sample.sample(logits, Draw(*columns)), reference.sample(logits.float(), Draw(*columns)))


def test_many_draws_stay_within_what_is_kept() -> None:
    torch.manual_seed(6)
    logits = (torch.randn(1, 300) * 2).repeat(16, 1)
    columns = _columns(16, top_k=[20] * 16, top_p=[0.8] * 16, seeds=[2**63 - 1 - i * 977 for i in range(16)])
    got = sample.sample(logits, Draw(*columns))
    assert torch.equal(got, reference.sample(logits, Draw(*columns)))
    kept = reference.kept_tokens(logits[0], 1.0, 20, 0.8, 0.0)
    assert (kept[got.long()] > 0).all() and len(set(got.tolist())) > 3


def test_same_draw_as_the_engines_sampler() -> None:
    """A seeded request gives the same tokens on every device: same draw, same order, same filters."""
    torch.manual_seed(7)
    logits = torch.randn(4, 1000) * 2
    columns = _columns(4, top_k=[-1, 30, -1, 12], top_p=[1.0, 1.0, 0.7, 0.9], seeds=[-1, 0, 5, -(2**40)])
    rows = engine_sampler.SamplingRows(
        temperature=columns[0].numpy(),
        top_k=np.array([1000, 30, 1000, 12], np.int32),
        top_p=columns[2].numpy(),
        min_p=columns[3].numpy(),
        seeds=columns[4].numpy().view(np.uint64),
        positions=columns[5].numpy().astype(np.uint64),
        greedy=np.zeros(4, np.bool_),
    )
    from phloem.kernels.ops import Draw, Ops

    assert sample.sample(logits, Draw(*columns)).tolist() == engine_sampler.sample(logits, rows, Ops()).tolist()


def test_ties_are_taken_in_token_order() -> None:
    """Of ten equal tokens top-k 3 keeps the first three, top-p 0.35 the first four."""
    logits = torch.full((20, 10), 1.5)
    columns = _columns(20, top_k=[3] * 20)
    assert set(sample.sample(logits, Draw(*columns)).tolist()) == {0, 1, 2}
    columns = _columns(20, top_p=[0.35] * 20)
    assert set(sample.sample(logits, Draw(*columns)).tolist()) == {0, 1, 2, 3}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((8, 70), float("-inf"))
    logits[:, 65] = -3.0
    logits[:, 2] = -3.0
    for setting in ({}, {"top_k": [50] * 8}, {"top_p": [0.99] * 8}):
        assert set(sample.sample(logits, Draw(*_columns(8, **setting))).tolist()) == {2, 65}


@pytest.mark.parametrize("vocab", [1, 33, 2048, 40001])
def test_argmax_and_logsumexp(vocab: int) -> None:
    logits = torch.randn(3, vocab) * 4
    if vocab > 2:
        logits[1, 1] = logits[1, vocab - 1] = 50.0
        logits[2, : vocab // 2] = float("-inf")
    assert torch.equal(sample.argmax(logits), logits.argmax(-1).int())
    torch.testing.assert_close(sample.logsumexp(logits), logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", [1, 3, 5])
def test_mask_of_some_rows(words: int) -> None:
    from phloem.kernels import reference as ref

    logits = torch.randn(4, 101)
    rows, mask = torch.tensor([3, 1]).int(), torch.randint(-(2**31), 2**31, (2, words)).int()
    want = logits.clone()
    ref.mask_tokens_(want, rows, mask)
    sample.mask_tokens_(logits, rows, mask)
    assert torch.equal(logits, want)
