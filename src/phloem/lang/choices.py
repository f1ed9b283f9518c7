"""How `select` and `gen(choices=...)` pick one of several texts from the model's likelihoods."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol


@dataclass
class Scored:
    """Choices with their tokens, all behind the same prompt tokens.

    `ids[i][t]` and `logprobs[i][t]`: token and log-probability at place `t` of choice `i`. `unconditional[i][t]`: the
    log-probability of the same token without the prompt; present where the method asks for it.
    """

    choices: list[str]
    ids: list[list[int]]
    logprobs: list[list[float]]
    unconditional: list[list[float]] | None = None


@dataclass
class ChoicesDecision:
    """The picked text, and what it was picked by."""

    decision: str
    meta_info: dict[str, Any] = field(default_factory=dict)


class ChoicesMethod(Protocol):
    """Picks one of scored choices. `needs_unconditional` asks for `Scored.unconditional`."""

    needs_unconditional: bool

    def __call__(self, scored: Scored) -> ChoicesDecision: ...


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 0.0


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i])


def _meta(scored: Scored) -> dict[str, Any]:
    return {
        "normalized_prompt_logprobs": [_mean(values) for values in scored.logprobs],
        "input_token_logprobs": [
            [[logprob, token, None] for logprob, token in zip(values, ids, strict=True)]
            for values, ids in zip(scored.logprobs, scored.ids, strict=True)
        ],
    }


class TokenLengthNormalized:
    """The highest mean log-probability per token."""

    needs_unconditional = False

    def __call__(self, scored: Scored) -> ChoicesDecision:
        meta = _meta(scored)
        return ChoicesDecision(scored.choices[_best(meta["normalized_prompt_logprobs"])], meta)


class GreedyTokenSelection:
    """Token by token, as greedy decoding would among the choices that are still open.

    Where a choice has ended and others go on, it takes part with its mean log-probability. A longer choice can
    therefore win over its own beginning.
    """

    needs_unconditional = False

    def __call__(self, scored: Scored) -> ChoicesDecision:
        means = [_mean(values) for values in scored.logprobs]
        longest = max(len(values) for values in scored.logprobs)
        rows = [
            [*values, *[mean] * (longest - len(values))] for values, mean in zip(scored.logprobs, means, strict=True)
        ]
        open_ = list(range(len(rows)))
        for place in range(longest):
            best = max(rows[i][place] for i in open_)
            open_ = [i for i in open_ if rows[i][place] == best or self._same(scored, i, open_, rows, place, best)]
            if len(open_) == 1:
                break
        meta = {**_meta(scored), "greedy_logprob_matrix": rows}
        return ChoicesDecision(scored.choices[open_[0]], meta)

    @staticmethod
    def _same(scored: Scored, i: int, open_: list[int], rows: list[list[float]], place: int, best: float) -> bool:
        """Whether a choice has the very token that is best: its score may differ in the last bit between batches."""
        if place >= len(scored.ids[i]):
            return False
        token = scored.ids[i][place]
        return any(rows[j][place] == best and scored.ids[j][place : place + 1] == [token] for j in open_)


class UnconditionalLikelihoodNormalized:
    """The highest mean of log P(token | prompt) - log P(token): choices that are likely anywhere gain nothing.

    Source: "Multiple Choice Normalization in LM Evaluation", EleutherAI, 2021.
    """

    needs_unconditional = True

    def __call__(self, scored: Scored) -> ChoicesDecision:
        if scored.unconditional is None:
            raise ValueError("this method needs the unconditional log-probabilities")
        gains = [
            _mean([a - b for a, b in zip(with_prompt, alone, strict=True)])
            for with_prompt, alone in zip(scored.logprobs, scored.unconditional, strict=True)
        ]
        meta = {**_meta(scored), "unconditional_token_logprobs": scored.unconditional, "normalized_gains": gains}
        return ChoicesDecision(scored.choices[_best(gains)], meta)


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()
