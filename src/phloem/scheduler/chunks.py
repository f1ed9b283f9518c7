"""Chunks of a prompt that take equal time as what is before them grows: stages of a pipeline then wait for each other
as little behind a long prompt's last chunk as behind its first, and so do rows that decode beside it.

A chunk of x tokens behind L others takes a (x^2 + 2 L x) + b x + c seconds: each new token attends to all before it,
everything else goes by tokens, and c by steps. What a step may take is what its budget of tokens would, had they
nothing before them. a / b says all that is needed for that; it is found from the last steps themselves.

(SGLang's `--enable-dynamic-chunking` solves the same equation, over a fit of steps that are run at the start.)
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phloem.core.batch import Batch

    Floats = NDArray[np.float64]

LEAST = 4  # a chunk has 1 / LEAST of the tokens that are left, whatever they cost: so does each step
SAMPLES = 64  # steps that are remembered
ENOUGH = 8  # before so many nothing is believed of them
EACH = 4  # steps from one fit to the next
ROWS = 8  # prompt tokens for each row that decodes, from which on a step tells of prompts
ALIKE = 0.05  # values that differ less, relative to the largest, tell no slope
FAR = 4.0  # median errors beyond which a step is left out: something else took its time


@dataclass(frozen=True, slots=True)
class Price:
    """What tokens cost, in tokens with nothing before them. `ratio`: a / b, in 1 / tokens; 0: all cost the same."""

    ratio: float = 0.0

    def most(self, left: int, start: int) -> int:
        """Tokens behind `start` others that `left` pays for: at most as many."""
        if left <= 0 or not self.ratio:
            return max(0, left)
        # ratio x^2 + (2 ratio start + 1) x = ratio left^2 + left; of its two forms the one that takes no difference
        # of near numbers.
        half, whole = self.ratio * start + 0.5, (self.ratio * left + 1.0) * left
        found = int(whole / (half + math.sqrt(half * half + self.ratio * whole)) + 1e-9)
        return min(left, max(found, left // LEAST, 1))

    def worth(self, counts: Floats, starts: Floats) -> float:
        """What chunks of `counts` tokens behind `starts` others cost, in tokens with nothing before them."""
        cost = float((self.ratio * counts * (counts + 2 * starts) + counts).sum())
        return 2.0 * cost / (1.0 + math.sqrt(1.0 + 4.0 * self.ratio * cost))

    def left(self, left: int, start: int, count: int) -> int:
        """Of `left` what remains when `count` tokens behind `start` others are paid."""
        if not self.ratio:
            return left - count
        rest = (self.ratio * left + 1.0) * left - (self.ratio * (count + 2 * start) + 1.0) * count
        if rest <= 0:
            return 0
        found = int(2.0 * rest / (1.0 + math.sqrt(1.0 + 4.0 * self.ratio * rest)) + 1e-9)
        return min(left - count, found)


@dataclass(frozen=True, slots=True)
class Sample:
    """A step: new tokens, pairs of them with those before (x^2 + 2 L x of each row), and seconds."""

    tokens: float
    pairs: float
    seconds: float


class Chunks:
    """Learns from steps what a token costs; `price` says it."""

    def __init__(self) -> None:
        self.price = Price()
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._news = 0

    def saw(self, batch: Batch, seconds: float) -> None:
        """A batch has run for so long on the first stage."""
        x, before = batch.query_lens.astype(np.float64), batch.prefix_lens.astype(np.float64)
        prompts, decodes = float(x[x > 1].sum()), int((x == 1).sum())
        if prompts < ROWS * max(decodes, 1):
            return
        self.took(Sample(float(x.sum()), float((x * (x + 2 * before)).sum()), seconds))

    def took(self, sample: Sample) -> None:
        """A step with prompts is done."""
        if sample.seconds <= 0:
            return
        self._samples.append(sample)
        self._news += 1
        if len(self._samples) >= ENOUGH and self._news >= EACH:
            self._news = 0
            ratio = ratio_of(list(self._samples))
            if ratio is not None:
                self.price = Price(ratio)


def ratio_of(samples: list[Sample]) -> float | None:
    """a / b by least squares of relative errors; 0 where later tokens of a prompt cost no more. None: unknown."""
    found = np.array([(one.tokens, one.pairs, one.seconds) for one in samples])
    if not _differ(found[:, 1] / found[:, 0]):
        return None
    scale = found.max(0)  # so that no column is tiny beside another
    fitted = _fitted(found / scale)
    if fitted is None:
        return 0.0
    solved, errors = fitted
    close = errors <= FAR * max(float(np.median(errors)), 1e-12)
    again = _fitted(found[close] / scale) if close.sum() >= ENOUGH else None
    a, b = (solved if again is None else again[0])[:2]
    return float(a / b * scale[0] / scale[1])


def _differ(values: Floats) -> bool:
    return bool(np.ptp(values) > ALIKE * values.max())


def _fitted(found: Floats) -> tuple[Floats, Floats] | None:
    """(a, b, c), and how far from them each sample is, of its seconds. With c only where tokens differ: else b has it
    too. None: a would be below 0."""
    tokens, pairs, seconds = found.T
    ones = np.ones_like(tokens)
    for columns in ((pairs, tokens, ones), (pairs, tokens)):
        if len(columns) == 3 and not _differ(tokens):
            continue
        matrix = np.stack(columns, 1) / seconds[:, None]
        solved: Floats = np.linalg.lstsq(matrix, ones, rcond=None)[0]
        if solved[0] > 0 and solved[1] > 0 and (solved >= 0).all():
            return solved, np.abs(matrix @ solved - 1.0)
    return None
