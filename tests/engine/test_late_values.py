"""On a device, nothing that a request asks for beside its token makes a step wait for the step before it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stepping import HOST, LateCopies, bits, runner_of

from phloem.checkpoint.describe import describe
from phloem.core.batch import FROM_DEVICE, Admission, Batch, StepOutput
from phloem.core.request import SamplingParams
from phloem.engine import forward as forward_file
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import Model, load_model
from phloem.platforms._facts import StepFacts
from phloem.platforms._streams import Arriving
from phloem.testing.checkpoints import VOCAB, tiny_checkpoint

WORDS = (VOCAB + 31) // 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return load_model(describe(str(path)), BuildContext(Ops(), torch.float32, torch.device("cpu")))


class Slow(LateCopies):
    """Copies that end long after the next step could begin; who waits for them is noted."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def down(self, tensors: Any) -> Arriving:
        events, asked = self.events, list[int]()

        class Event:
            def query(self) -> bool:
                asked.append(1)
                return len(asked) > 30

            def synchronize(self) -> None:
                events.append("waited")

        return Arriving([tensor.clone() for tensor in tensors], Event())


class Follow:
    """Allows one token a step: 50 and so on; the tokens that it was told are kept."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def masks(self, sampled: Any, drafts: Any) -> Any:
        self.told += sampled
        return [bits(50 + len(self.told), words=WORDS)]


def two_steps(model: Model, monkeypatch: pytest.MonkeyPatch, streams: Slow | None, **asked: Any) -> list[StepOutput]:
    """A prompt of seven tokens beside a plain one, then a decode step of both, launched before the first has begun."""
    follower = asked.pop("follower", None)
    plain = forward_file.run_forward

    def noted(*given: Any) -> torch.Tensor:
        if streams is not None:
            streams.events.append("forward")
        return plain(*given)

    facts = HOST if streams is None else StepFacts()
    with monkeypatch.context() as patch:
        patch.setattr(forward_file, "run_forward", noted)
        runner = runner_of(model, 2, facts=facts, streams=streams)
        prompt = np.arange(10, 17, dtype=np.int32)
        params = SamplingParams(temperature=0.0)
        rows = [
            Admission(0, "a", params, 0, prompt, 7, constrained=follower is not None, **asked),
            Admission(1, "b", params, 0, prompt, 7),
        ]
        table = np.arange(1, 9, dtype=np.int32).reshape(2, 4)
        slots, one = np.arange(2, dtype=np.int32), np.ones(2, np.int32)
        targets = {0: np.append(prompt[1:], -1).astype(np.int32)} if asked else {}
        steps = [
            Batch(0, slots, one * 7, one * 0, np.tile(prompt, 2), (table,), one, rows, targets),
            Batch(1, slots, one, one * 7, one * FROM_DEVICE, (table,), one),
        ]
        begin = threading.Event()
        runner.between(begin.wait)
        if follower is not None:
            runner.constrain(0, follower)
        pending = [runner.launch(batch) for batch in steps]
        begin.set()
        found = [one.result() for one in pending]
        runner.close()
    return found


def test_a_grammars_step_begins_before_the_last_token_is_known(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    streams, follower = Slow(), Follow()
    first, second = two_steps(model, monkeypatch, streams, follower=follower)
    assert streams.events[:3] == ["forward", "forward", "waited"]
    assert first.tokens[0] == 50 and second.tokens[0] == 51 and follower.told == [50]
    plain = two_steps(model, monkeypatch, None, follower=Follow())
    assert [one.tokens.tolist() for one in plain] == [first.tokens.tolist(), second.tokens.tolist()]


def test_logprobs_and_states_are_read_when_the_step_lands(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"return_logprob": True, "top_logprobs": 300, "token_ids_logprob": (3, 9), "return_hidden": True}
    streams = Slow()
    late = two_steps(model, monkeypatch, streams, **asked)
    assert streams.events[:2] == ["forward", "forward"] and streams.events.count("waited") >= 6
    here = two_steps(model, monkeypatch, None, **asked)
    for one, other in zip(late, here, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and list(one.logprobs) == [0]
        (mine,), (theirs,) = one.logprobs[0], other.logprobs[0]
        assert len(mine.top) == min(300, VOCAB) and mine.top[0][0] == pytest.approx(mine.token)
        assert [token for token, _ in mine.top] == pytest.approx([token for token, _ in theirs.top], abs=1e-5)
        assert [ids for _, ids in mine.chosen] == [3, 9]
        assert [value for value, _ in mine.chosen] == pytest.approx([value for value, _ in theirs.chosen], abs=1e-5)
        np.testing.assert_allclose(one.hidden[0], other.hidden[0], atol=1e-5)
    prompts = [outputs[0].prompt_logprobs[0] for outputs in (late, here)]
    assert len(prompts[0]) == 6
    assert [item.token for item in prompts[0]] == pytest.approx([item.token for item in prompts[1]], abs=1e-5)
    assert [len(item.chosen) for item in prompts[0]] == [2] * 6
