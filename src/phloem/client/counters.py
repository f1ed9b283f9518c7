"""What the door counts about its requests, without any metrics library."""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation
    from phloem.core.messages import Chunk, Painted, Stats

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0, 120.0)
ITL_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0)
GRAMMAR_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
STEP_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0)
E2E_BUCKETS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0)


class Histogram:
    """Cumulative counts by upper bound, in seconds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many at most that), as Prometheus wants them."""
        total, out = 0, list[tuple[str, float]]()
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            out.append((bound, total))
        return out


class Counters:
    """Totals since the door opened, over all engines it has had."""

    def __init__(self) -> None:
        self.requests = 0
        self.aborted = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.cached_tokens = {"device": 0, "host": 0, "storage": 0}  # by where they were
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(ITL_BUCKETS)
        self.e2e = Histogram(E2E_BUCKETS)
        self.grammar = Histogram(GRAMMAR_BUCKETS)
        self.images = self.videos = 0
        self.image_pixels = 0
        self.image_queue = Histogram(E2E_BUCKETS)
        self.image_steps = Histogram(STEP_BUCKETS)
        self.image_e2e = Histogram(E2E_BUCKETS)

    def on_chunk(self, output: Continuation, chunk: Chunk, now: float) -> None:
        count = len(chunk.tokens)
        if not count:
            return
        self.generation_tokens += count
        if output.first_at:
            self.itl.observe((now - output.last_at) / count, count)
        else:
            output.first_at = now
            self.ttft.observe(now - output.arrival)
        output.last_at = now

    def on_tokens(self, count: int, gap: float) -> None:
        """`count` requests have one more token each, `gap` seconds after the one before."""
        self.generation_tokens += count
        self.itl.observe(gap, count)

    def on_picture(self, told: Painted, seconds: float) -> None:
        """A picture or a film is finished, so long after it was asked for."""
        if told.frames:
            self.videos += 1
        else:
            self.images += 1
        self.image_pixels += told.width * told.height * max(1, told.frames)
        self.image_queue.observe(told.queue_seconds)
        self.image_e2e.observe(seconds)

    def on_stats(self, stats: Stats) -> None:
        for seconds in stats.step_seconds:
            self.image_steps.observe(seconds)
        for seconds in stats.grammar_seconds:
            self.grammar.observe(seconds)

    def on_finish(self, output: Continuation) -> None:
        self.requests += 1
        self.prompt_tokens += output.prompt_tokens
        host, storage = output.cached_host, output.cached_storage
        self.cached_tokens["host"] += host
        self.cached_tokens["storage"] += storage
        self.cached_tokens["device"] += output.cached_tokens - host - storage
        output.last_at = output.last_at or time.monotonic()
        self.e2e.observe(time.monotonic() - output.arrival)
