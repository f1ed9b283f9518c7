"""Answer of `/v1/score`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from phloem.protocol.answers import Answer, Usage

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation
    from phloem.protocol.score.body import ScoreBody


class ScoreAnswer(Answer, kw_only=True):
    """One list per item: a score per label token."""

    scores: list[list[float]]
    model: str
    usage: Usage
    object: Literal["scoring"] = "scoring"


def scores(body: ScoreBody, outputs: list[Continuation]) -> list[list[float]]:
    """A score per label token, for each item."""
    return [_scores(output, body.label_token_ids or [], bool(body.apply_softmax)) for output in outputs]


def _scores(output: Continuation, labels: list[int], softmax: bool) -> list[float]:
    """Probabilities in the order of the labels: over all tokens, or with `softmax` among the labels."""
    known = {token: value for value, token in output.logprobs.chosen[0]} if output.logprobs.chosen else {}
    values = [known.get(token, -math.inf) for token in labels]
    best = max(values) if softmax else 0.0
    if math.isinf(best):
        return [0.0] * len(values)
    weights = [math.exp(value - best) for value in values]
    total = sum(weights) if softmax else 1.0
    return [weight / total for weight in weights]
