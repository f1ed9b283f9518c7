"""Requests that meet everything a scheduler does, and what an engine answers to them."""

from __future__ import annotations

import random
from typing import Any

from phloem.core.messages import Drain, FromEngine, Submit, ToEngine, Tokens, pack_ids
from phloem.core.request import SamplingParams
from phloem.launch.core import EngineCore
from phloem.testing.driver import Unfold


def answers(core: EngineCore, submits: list[Submit]) -> dict[str, Any]:
    """Of each request its tokens, and log probabilities of these and of its prompt where it wants any."""
    found: dict[str, Any] = {submit.id: ([], [], []) for submit in submits}
    left = {submit.id for submit in submits}
    waiting: list[ToEngine] = list(submits)
    unfold = Unfold()

    def send(message: FromEngine) -> None:
        if isinstance(message, Tokens):
            for chunk in unfold.chunks(message):
                found[chunk.id][0].extend(chunk.tokens)
                if chunk.logprobs is not None:
                    found[chunk.id][1].extend(chunk.logprobs.values)
                if chunk.prompt_logprobs is not None:
                    found[chunk.id][2].extend(chunk.prompt_logprobs.values)
                if chunk.finish is not None:
                    assert chunk.finish.type in ("length", "stop"), chunk.finish
                    left.discard(chunk.id)

    def poll(timeout: float | None) -> list[ToEngine]:
        out, waiting[:] = list(waiting), []
        return out or ([] if left else [Drain(timeout=0.0)])

    core._sends = send  # pyright: ignore[reportPrivateUsage]
    core.run(poll)
    return found


def load() -> list[Submit]:
    """Prompts that share prefixes and are longer than a step, more than fit at once, chosen in every way."""
    rng, found = random.Random(4), list[Submit]()
    shared = [rng.randrange(4, 380) for _ in range(30)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "regex": "[a-f ]{5,30}"},
    ]
    for number in range(8):
        prompt = shared[: rng.randrange(4, 30)] + [rng.randrange(4, 380) for _ in range(rng.randrange(1, 25))]
        most = 24 if number % 5 == 0 else 10  # greedy ones are alone at last
        sampling = SamplingParams(max_new_tokens=most, sampling_seed=number, ignore_eos=True, **kinds[number % 5])
        wants: dict[str, Any] = {"return_logprob": True, "logprob_start": 0} if number in (1, 7) else {}
        found.append(Submit(id=f"q{number}", input_ids=pack_ids(prompt), sampling=sampling, **wants))
    return found
