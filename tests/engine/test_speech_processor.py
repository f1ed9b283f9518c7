"""The rules of a transcript are those of transformers' processors, on any tokens so far."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from phloem.core.errors import BadRequest
from phloem.engine.processors import make

END, FIRST, SIZE = 40, 50, 80
RULES: dict[str, Any] = {"end": END, "first_timestamp": FIRST, "latest_first": 12, "suppressed": [3, 4]}


def test_rules_are_those_of_transformers() -> None:
    from transformers import GenerationConfig
    from transformers.generation import WhisperTimeStampLogitsProcessor

    config: Any = GenerationConfig(eos_token_id=END, no_timestamps_token_id=FIRST - 1, max_initial_timestamp_index=12)
    theirs = WhisperTimeStampLogitsProcessor(config, begin_index=2)
    (ours,) = make({"speech": RULES}, SIZE)
    rng = np.random.default_rng(1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        output: list[int] = []
        for _ in range(int(rng.integers(0, 9))):  # such as the rules allow
            logits = torch.randn(SIZE, generator=generator) * 3
            ours.apply_(output, logits)
            output.append(int(logits.argmax()))
        logits = torch.randn(SIZE, generator=generator) * 3
        want = logits.clone()
        want[[3, 4, *range(END + 1, FIRST - 1)]] = float("-inf")  # of these theirs knows nothing
        want = theirs(torch.tensor([[1, 2, *output]]), want[None])[0]
        ours.apply_(output, logits)
        assert torch.equal(logits, want), output


def test_without_timestamps_none_comes() -> None:
    (ours,) = make({"speech": {**RULES, "timestamps": False, "suppressed_first": [END]}}, SIZE)
    logits = torch.zeros(SIZE)
    ours.apply_([], logits)
    assert logits.isneginf().nonzero().flatten().tolist() == [3, 4, END, *range(FIRST, SIZE)]


@pytest.mark.parametrize("wrong", [{"end": 60}, {"first_timestamp": 90}, {"timestamps": 1}, {"suppressed": [999]}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        make({"speech": {**RULES, **wrong}}, SIZE)
