"""Masks of a step: the right rows, in one call, computed ahead or not; a failure is its row's alone."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from phloem.core.batch import Admission
from phloem.core.request import SamplingParams
from phloem.engine.sampling.masks import Masks
from phloem.engine.sampling.slots import Slots
from phloem.engine.wanted import Wanted
from phloem.kernels.ops import Ops

VOCAB = 70  # not a multiple of 32
OPS = Ops("reference")


class Follows:
    """A follower that answers with what a function of (sampled, drafts) gives."""

    def __init__(self, masks: Any) -> None:
        self.masks = masks


def slots_with(*followers: Any) -> list[Any]:
    slots = Slots(len(followers), VOCAB, torch.device("cpu"))
    for at, follower in enumerate(followers):
        tokens = np.array([1, 2], np.int32)
        constrained = follower is not None
        slots.admit(Admission(at, f"r{at}", SamplingParams(), 1, tokens, 2, constrained=constrained), follower)
    return [slots[at] for at in range(len(followers))]


def wanted(*drafts: list[int]) -> Wanted:
    """The positions of rows with these drafts."""
    counts = np.array([1 + len(one) for one in drafts])
    rows = np.repeat(np.arange(len(drafts)), counts)
    behind = np.array([token for one in drafts for token in [*one, -1]], np.int32)
    return Wanted(rows, rows.astype(np.int32), rows.astype(np.int32), rows, behind, np.cumsum(counts) - counts)


def plain(count: int) -> Wanted:
    return wanted(*[[] for _ in range(count)])


def mask_of(*tokens: int, words: int = 3) -> Any:
    mask = np.zeros(words, np.int32)
    for token in tokens:
        mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    return mask


def allow(*tokens: int, words: int = 3) -> Any:
    return Follows(lambda sampled, drafts: [mask_of(*tokens, words=words)])


def finite(logits: torch.Tensor) -> list[list[int]]:
    return [torch.isfinite(row).nonzero().flatten().tolist() for row in logits]


@pytest.fixture(params=["after", "ahead"])
def masks(request: pytest.FixtureRequest) -> Any:
    made = Masks(VOCAB, torch.device("cpu"), OPS, ahead=request.param == "ahead")
    yield made
    made.close()


def test_rows_are_masked_alone(masks: Masks) -> None:
    everything = list(range(VOCAB))
    slots = slots_with(None, allow(3, 31, 32, 69), Follows(lambda sampled, drafts: [None]), allow(5, words=1), None)
    for _ in range(2):
        logits = torch.randn(5, VOCAB)
        masks.begin(slots, plain(5))
        assert masks.apply_(logits) == {}
        assert finite(logits) == [everything, [3, 31, 32, 69], everything, [5], everything]


def test_a_failure_is_its_rows_alone(masks: Masks) -> None:
    def broken(sampled: Any, drafts: Any) -> Any:
        raise ValueError("stuck")

    slots = slots_with(allow(1), Follows(broken), allow(), allow(2))
    logits = torch.randn(4, VOCAB)
    masks.begin(slots, plain(4))
    failed = masks.apply_(logits)
    assert set(failed) == {1, 2} and "stuck" in str(failed[1]) and "allows no token" in str(failed[2])
    assert finite(logits)[0] == [1] and finite(logits)[3] == [2]


def test_each_mask_hears_of_a_token_once(masks: Masks) -> None:
    heard: list[list[int]] = []
    slots = slots_with(Follows(lambda sampled, drafts: heard.append(sampled) or [None]))
    for token in (7, 8):
        masks.begin(slots, plain(1))
        masks.apply_(torch.randn(1, VOCAB))
        slots[0].untold.append(token)
    masks.begin(slots, plain(1))
    masks.apply_(torch.randn(1, VOCAB))
    assert heard == [[], [7], [8]]


def test_nothing_to_do(masks: Masks) -> None:
    slots = slots_with(None, None)
    masks.begin(slots, plain(2))
    assert masks.apply_(torch.randn(2, VOCAB)) == {}


def test_ahead_runs_in_its_own_thread() -> None:
    masks = Masks(VOCAB, torch.device("cpu"), OPS, ahead=True)
    seen: list[str] = []
    slots = slots_with(Follows(lambda sampled, drafts: seen.append(threading.current_thread().name) or [None]))
    masks.begin(slots, plain(1))
    assert masks._started is not None
    masks._started.result()
    assert seen and seen[0].startswith("phloem-masks")
    masks.close()


def test_each_position_behind_a_draft_has_its_mask(masks: Masks) -> None:
    heard: list[Any] = []

    def follow(sampled: Any, drafts: Any) -> Any:
        heard.append(list(drafts))
        return [mask_of(1), mask_of(2, 3), None, mask_of()][: 2 + len(drafts) // 2]

    slots = slots_with(Follows(follow), None, Follows(follow))
    places = [slots[0]] * 2 + [slots[1]] * 3 + [slots[2]] * 4
    positions = wanted([1], [7, 8], [1, 2, 9])
    logits = torch.randn(9, VOCAB)
    masks.begin(places, positions)
    assert masks.apply_(logits) == {} and heard == [[1], [1, 2, 9]]
    everything = list(range(VOCAB))
    # The last row's third draft was refused: what comes behind it has no mask, and does not count.
    assert finite(logits) == [[1], [2, 3], *[everything] * 3, [1], [2, 3], everything, everything]
