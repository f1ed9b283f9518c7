"""What clients saw and how the work was spread: percentiles, hit rate, load."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.core.messages import Tokens

STEP = math.log(1.01)  # gaps between tokens are counted in classes that differ by 1 %
LEAST = 1e-6


class Gaps:
    """A histogram of times: they are far too many to keep."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, seconds: float, count: int = 1) -> None:
        key = int(math.log(max(seconds, LEAST) / LEAST) / STEP)
        self._counts[key] = self._counts.get(key, 0) + count

    @property
    def count(self) -> int:
        return sum(self._counts.values())

    def percentile(self, share: float) -> float:
        """NaN for nothing."""
        left = share * self.count
        for key in sorted(self._counts):
            left -= self._counts[key]
            if left <= 0:
                return LEAST * math.exp((key + 0.5) * STEP)
        return math.nan


class _Stream:
    """The requests of one replica that have a token in each message, and when the last one came."""

    __slots__ = ("at", "last", "rows")

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.at = 0.0
        self.last: dict[str, float] = {}

    def settle(self) -> None:
        """From now on each request has a time of its own."""
        for name in self.rows:
            self.last[name] = self.at
        self.rows = []


class Seen:
    def __init__(self, replicas: int) -> None:
        self.ttft: list[float] = []
        self.tiers: dict[str, list[float]] = {}  # the same of each class
        self.e2e: list[float] = []
        self.gaps = Gaps()
        self.failed = self.unfinished = self.output = 0
        self.asked_for = self.prompt = self.reused = 0
        self.end = 0.0
        self.sent = [0] * replicas
        self.busy: list[float] = []
        self._streams = [_Stream() for _ in range(replicas)]
        self._computed = self._cached = self._preemptions = 0
        self._uneven: list[float] = []

    def asked(self, tokens: int, reused: int) -> None:
        self.asked_for += 1
        self.prompt, self.reused = self.prompt + tokens, self.reused + reused

    def first(self, seconds: float, tier: str = "") -> None:
        self.ttft.append(seconds)
        if tier:
            self.tiers.setdefault(tier, []).append(seconds)

    def done(self, seconds: float, tokens: int, now: float) -> None:
        self.e2e.append(seconds)
        self.output += tokens
        self.end = max(self.end, now)

    def tokens(self, number: int, message: Tokens, now: float) -> None:
        """Gaps between tokens: those of rows that go on together are counted at once."""
        stream = self._streams[number]
        if message.plain and message.rows is None and stream.rows:
            self.gaps.add(now - stream.at, len(message.plain))
            stream.at = now
        elif message.rows is not None:
            stream.settle()
            for name in message.rows:
                self.gaps.add(now - stream.last[name])
            stream.rows, stream.at = message.rows, now
        for chunk in message.chunks:
            self._chunk(stream, chunk.id, len(chunk.tokens), now, chunk.finish is not None)

    def _chunk(self, stream: _Stream, name: str, count: int, now: float, ended: bool) -> None:
        stream.settle()
        if count and name in stream.last:
            self.gaps.add(now - stream.last[name])
        stream.last[name] = now
        if ended:
            del stream.last[name]

    def spread(self, running: Sequence[int]) -> None:
        """How many requests each replica has at this moment."""
        if any(running):
            self._uneven.append(max(running) * len(running) / sum(running))

    def ended(self, prompt: int, cached: int, preemptions: int, busy: float) -> None:
        """A replica's own counts."""
        self._computed, self._cached = self._computed + prompt, self._cached + cached
        self._preemptions += preemptions
        self.busy.append(busy)

    def told(self) -> dict[str, Any]:
        """Times in ms; `hit_rate` of the replicas' own count, `ideal_hit_rate` of one endless cache for all."""
        busy, end = np.array(self.busy), max(self.end, 1e-9)
        itl = {f"p{round(share * 100)}": round(self.gaps.percentile(share) * 1e3, 2) for share in (0.5, 0.9, 0.99)}
        return {
            "requests": len(self.e2e),
            "failed": self.failed,
            "unfinished": self.unfinished,
            "seconds": round(end, 3),
            "requests_per_s": round(len(self.e2e) / end, 3),
            "output_tok_per_s": round(self.output / end, 1),
            "mean_prompt": round(self.prompt / max(self.asked_for, 1), 1),
            "mean_output": round(self.output / max(len(self.e2e), 1), 1),
            "hit_rate": round(self._cached / max(self._computed, 1), 4),
            "ideal_hit_rate": round(self.reused / max(self.prompt, 1), 4),
            "ttft_ms": _spread(self.ttft),
            "ttft_ms_of": {tier: _spread(seconds) for tier, seconds in self.tiers.items()},
            "itl_ms": itl,
            "e2e_ms": _spread(self.e2e),
            "preemptions": self._preemptions,
            "load": {
                "busy_mean": round(float(busy.mean()) / end, 4),
                "busy_max": round(float(busy.max()) / end, 4),
                "busy_cv": round(float(busy.std() / max(busy.mean(), 1e-9)), 4),
                "running_max_over_mean": round(float(np.mean(self._uneven)) if self._uneven else 0.0, 3),
                "requests_max": max(self.sent),
                "requests_min": min(self.sent),
            },
        }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    found = np.percentile(np.array(seconds) * 1e3, [50, 90, 99])
    return {
        "mean": round(float(np.mean(seconds)) * 1e3, 2),
        **{name: round(float(value), 2) for name, value in zip(("p50", "p90", "p99"), found, strict=True)},
    }
