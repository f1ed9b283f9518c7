"""Masks of a step: the right rows, in one call, computed ahead or not; a failure is its row's alone."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from phloem.core.batch import Admission
from phloem.core.request import SamplingParams
from phloem.engine.masks import Masks
from phloem.engine.slots import Slots
from phloem.kernels.ops import Ops

VOCAB = 70  # not a multiple of 32
OPS = Ops("reference")


def slots_with(*masks: Any) -> list[Any]:
    slots = Slots(len(masks), VOCAB, torch.device("cpu"))
    for at, mask in enumerate(masks):
        tokens = np.array([1, 2], np.int32)
        slots.admit(Admission(at, f"r{at}", SamplingParams(), 1, tokens, 2, mask=mask))
    return [slots[at] for at in range(len(masks))]


def allow(*tokens: int, words: int = 3) -> Any:
    mask = np.zeros(words, np.int32)
    for token in tokens:
        mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    return lambda sampled: mask


def finite(logits: torch.Tensor) -> list[list[int]]:
    return [torch.isfinite(row).nonzero().flatten().tolist() for row in logits]


@pytest.fixture(params=["after", "ahead"])
def masks(request: pytest.FixtureRequest) -> Any:
    made = Masks(6, VOCAB, torch.device("cpu"), OPS)
    if request.param == "ahead":
        from concurrent.futures import ThreadPoolExecutor

        made._pool = ThreadPoolExecutor(1)
    yield made
    made.close()


def test_rows_are_masked_alone(masks: Masks) -> None:
    everything = list(range(VOCAB))
    slots = slots_with(None, allow(3, 31, 32, 69), lambda sampled: None, allow(5, words=1), None)
    for _ in range(2):
        logits = torch.randn(5, VOCAB)
        masks.begin(slots)
        assert masks.apply_(slots, logits) == {}
        assert finite(logits) == [everything, [3, 31, 32, 69], everything, [5], everything]


def test_a_failure_is_its_rows_alone(masks: Masks) -> None:
    def broken(sampled: list[int]) -> Any:
        raise ValueError("stuck")

    slots = slots_with(allow(1), broken, allow(), allow(2))
    logits = torch.randn(4, VOCAB)
    masks.begin(slots)
    failed = masks.apply_(slots, logits)
    assert set(failed) == {1, 2} and "stuck" in str(failed[1]) and "allows no token" in str(failed[2])
    assert finite(logits)[0] == [1] and finite(logits)[3] == [2]


def test_each_mask_hears_of_a_token_once(masks: Masks) -> None:
    heard: list[list[int]] = []
    slots = slots_with(lambda sampled: heard.append(sampled) or None)
    for token in (7, 8):
        masks.begin(slots)
        masks.apply_(slots, torch.randn(1, VOCAB))
        slots[0].since_mask.append(token)
    masks.begin(slots)
    masks.apply_(slots, torch.randn(1, VOCAB))
    assert heard == [[], [7], [8]]


def test_nothing_to_do(masks: Masks) -> None:
    slots = slots_with(None, None)
    masks.begin(slots)
    assert masks.apply_(slots, torch.randn(2, VOCAB)) == {}


def test_ahead_runs_in_its_own_thread() -> None:
    masks = Masks(2, VOCAB, torch.device("meta"), OPS)
    seen: list[str] = []
    slots = slots_with(lambda sampled: seen.append(threading.current_thread().name) or None)
    masks.begin(slots)
    assert masks._started is not None
    masks._started.result()
    assert seen and seen[0].startswith("phloem-masks")
    masks.close()
