"""Requests over time: conversations drawn from stated distributions, or a trace file of Mooncake's form.

A conversation begins at random; its next turn comes when the answer has been read, and its prompt is all that was said
before, and something new. Conversations share system prompts, some of which are far more frequent than others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCABULARY = 1 << 30
ANSWER = 1  # the token that every answer is made of
SINGLE = 1 << 40  # from which on single prompts are numbered
BLOCK = 512  # tokens that an id of a trace file stands for


@dataclass(frozen=True)
class Mix:
    """Lengths in tokens. `first`, `later` and `output` are lognormal: (mean, sigma of the logarithm); how many turns
    there are is geometric with mean `turns`, the pause between them exponential with mean `think` seconds.

    `systems` different system prompts of `system` tokens are drawn by Zipf's law with exponent `zipf`. Conversations
    begin at gamma-distributed intervals whose standard deviation is `burst` of their mean: 1 is a Poisson process.
    """

    systems: int = 16
    system: int = 512
    zipf: float = 1.0
    first: tuple[float, float] = (400, 1.0)
    later: tuple[float, float] = (120, 1.0)
    output: tuple[float, float] = (220, 0.7)
    turns: float = 4.0
    think: float = 15.0
    burst: float = 1.0


# Near the means that Mooncake's paper (FAST 2025) gives of its traces: tokens in and out, and the share that an endless
# cache would find: conversation 12,035, 343, 0.40; tool and agent 8,596, 182, 0.59.
# `throughput` has the lengths of the benchmark of that name (docs/benchmarks.md).
MIXES = {
    "throughput": Mix(0, 0, 1.0, (256, 0.0), (256, 0.0), (128, 0.0), 1.0, 0.0),
    "chat": Mix(),
    "conversation": Mix(8, 300, 1.0, (8200, 1.1), (4200, 1.0), (343, 0.8), 2.0, 30.0, 1.3),
    "toolagent": Mix(24, 4300, 1.2, (3500, 1.0), (900, 1.0), (182, 0.9), 1.25, 5.0, 1.5),
}


@dataclass(slots=True)
class Conversation:
    """`turns`: tokens said, tokens of the answer, seconds until the next turn. `take` gives the next prompt."""

    number: int
    start: float
    turns: list[tuple[int, int, float]]
    system: NDArray[np.int32] | None = None
    known: bool = False  # whether its system prompt had been sent before
    fixed: NDArray[np.int32] | None = None  # the prompt, where a trace says it
    at: int = 0
    tier: str = ""  # its class
    user: str = ""  # whose it is
    history: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def output(self) -> int:
        return self.turns[self.at][1]

    def take(self, seed: int, context: int) -> tuple[NDArray[np.int32], int]:
        """The prompt of its next turn, and how much of it somebody has computed before; the oldest part is cut off
        where it leaves the answer no room in the `context`."""
        said, output, pause = self.turns[self.at]
        output = min(output, context // 2)
        self.turns[self.at] = said, output, pause
        longest = context - output - 1
        if self.fixed is not None:
            return self.fixed[-longest:], 0
        draw = np.random.default_rng((seed, 2, self.number, self.at))
        own = draw.integers(2, VOCABULARY, said, dtype=np.int32)
        before = self.history if self.at or self.system is None else self.system
        prompt = np.concatenate([before, own])
        reused = len(before) if self.at or self.known else 0
        if len(prompt) > longest:
            return prompt[-longest:], 0
        return prompt, reused

    def answered(self, prompt: NDArray[np.int32]) -> float | None:
        """Seconds until the next turn; None: that was the last one."""
        _, output, pause = self.turns[self.at]
        self.at += 1
        if self.at >= len(self.turns):
            self.history = np.empty(0, np.int32)
            return None
        self.history = np.concatenate([prompt, np.full(output, ANSWER, np.int32)])
        return pause


def conversations(mix: Mix, rate: float, seconds: float, seed: int) -> Iterator[Conversation]:
    """Those that begin within so many seconds, in order; `rate` requests a second, all turns counted."""
    draw = np.random.default_rng((seed, 0))
    systems = [
        np.random.default_rng((seed, 1, index)).integers(2, VOCABULARY, mix.system, dtype=np.int32)
        for index in range(mix.systems)
    ]
    weights = np.arange(1, mix.systems + 1, dtype=np.float64) ** -mix.zipf
    weights /= weights.sum() if len(weights) else 1.0
    shape, interval = 1 / mix.burst**2, mix.turns / rate
    seen, now, number = set[int](), 0.0, 0
    while True:
        now += float(draw.gamma(shape, interval / shape))
        if now >= seconds:
            return
        which = int(draw.choice(mix.systems, p=weights)) if mix.systems else -1
        count = int(draw.geometric(1 / mix.turns))
        lengths = [mix.first, *[mix.later] * (count - 1)]
        turns = [
            (_length(draw, *one), _length(draw, *mix.output), float(draw.exponential(mix.think))) for one in lengths
        ]
        yield Conversation(number, now, turns, systems[which] if which >= 0 else None, which in seen)
        seen.add(which)
        number += 1


def single(rate: float, tokens: int, seconds: float, tier: str = "", user: str = "") -> Iterator[Conversation]:
    """Prompts of so many tokens at even intervals, each answered by one token."""
    for number in range(int(rate * seconds)):
        yield Conversation(SINGLE + number, number / rate, [(tokens, 1, 0.0)], tier=tier, user=user)


def _length(draw: np.random.Generator, mean: float, sigma: float) -> int:
    return max(1, int(draw.lognormal(np.log(mean) - sigma * sigma / 2, sigma)))


def read_trace(path: Path, speed: float = 1.0) -> list[Conversation]:
    """Requests of a file of JSON lines: timestamp (ms), input_length, output_length, hash_ids (512 tokens each).

    Raises:
        ConfigError: naming the line and what is wrong with it.
    """
    found: list[Conversation] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path}: {error}", param="trace") from None
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            item: Any = json.loads(line)
            ids = np.array(item["hash_ids"], dtype=np.int64)
            length, output = int(item["input_length"]), int(item["output_length"])
            start = float(item["timestamp"]) / 1e3 / speed
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"trace {path}, line {number + 1}: {type(error).__name__}: {error}", param="trace"
            ) from None
        tokens = (ids[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)[:length] % (VOCABULARY - 2) + 2
        if not 0 < length <= len(ids) * BLOCK or output < 1:
            raise ConfigError(f"trace {path}, line {number + 1}: {length} tokens in {len(ids)} blocks", param="trace")
        found.append(Conversation(len(found), start, [(length, output, 0.0)], fixed=tokens.astype(np.int32)))
    return sorted(found, key=lambda item: item.start)
