"""Counting what the scheduler does, and the `Stats` message of about once a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.messages import Stats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phloem.core.batch import StepOutput
    from phloem.core.updates import Keeper
    from phloem.kvcache.manager import CacheManager

INTERVAL = 1.0  # seconds between two Stats while anything runs


def usage(cache: CacheManager) -> dict[str, int]:
    """What the first group of the memory holds, in tokens."""
    size = cache.page_size
    return {
        "total_tokens": cache.total_pages * size,
        "used_tokens": (cache.total_pages - cache.available_pages) * size,
        "available_tokens": cache.available_pages * size,
        "evictable_tokens": (cache.available_pages - cache.free_pages) * size,
        "evicted_tokens": cache.evicted_pages * size,
    }


def weights(keeper: Keeper | None) -> dict[str, Any]:
    """Which weights serve, for the server-info endpoint."""
    if keeper is None:
        return {}
    return {
        "weight_version": keeper.version,
        "weight_epoch": keeper.epoch,
        "weights_unfit": keeper.unfit,
        "asleep": sorted(keeper.asleep),
    }


class Meter:
    """Rates are over the time since the last `Stats`; `busy` time is that in which a step was planned or ran."""

    def __init__(self, now: float) -> None:
        self.steps = 0
        self.out_of_memory = 0  # steps that failed for lack of memory
        self.prefill_tokens = 0  # since start, and the forward time of the steps that had any
        self.prefill_seconds = 0.0
        self.busy_total = 0.0  # seconds, since start
        self.forward_total = 0.0
        self.last_throughput = 0.0
        self.encoded = self.found = 0  # pictures: of the tower, and of the encoder cache
        self._since = now
        self._tokens_then = 0
        self._busy = 0.0
        self._forward = 0.0
        self._busy_until: float | None = None
        self._quiet = True

    @property
    def seconds_a_token(self) -> float:
        """Of prompts, in the mean of all steps so far; 0: there was none."""
        return self.prefill_seconds / self.prefill_tokens if self.prefill_tokens else 0.0

    def step_done(self, output: StepOutput, prompts: int = 0) -> None:
        """`prompts`: tokens of prompts, less one a row."""
        self.steps += 1
        if prompts > 0:
            self.prefill_tokens += prompts
            self.prefill_seconds += output.forward_seconds
        self._forward += output.forward_seconds
        self.forward_total += output.forward_seconds
        self.encoded += output.encoded
        self.found += output.found

    def turn(self, begin: float, end: float, worked: bool) -> None:
        """One turn of the loop ran from `begin` to `end`."""
        if worked:
            # Between two working turns the loop received messages: that too is time outside the forward pass.
            seconds = end - (begin if self._busy_until is None else self._busy_until)
            self._busy += seconds
            self.busy_total += seconds
            self._quiet = False
        self._busy_until = end if worked else None

    def due(self, now: float, busy: bool) -> bool:
        """While anything runs about once a second, and once more when it has become idle."""
        if self._quiet:
            self._since = now
            return False
        return not busy or now - self._since >= INTERVAL

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "pictures_encoded": self.encoded,
            "pictures_found": self.found,
            "busy_seconds": self.busy_total,
            "forward_seconds": self.forward_total,
            "gen_throughput": self.last_throughput,
            "out_of_memory": self.out_of_memory,
        }

    def stats(
        self, now: float, busy: bool, tokens: int, counts: Mapping[str, Any], planner: Mapping[str, Any]
    ) -> Stats:
        """`tokens`: put out since the start; `counts`: fields of the message; `planner`: see `Planner.state`."""
        elapsed = max(now - self._since, 1e-9)
        self.last_throughput = (tokens - self._tokens_then) / elapsed
        outside = 1.0 - min(1.0, self._forward / self._busy) if self._busy > 0 else 0.0
        self._since, self._tokens_then = now, tokens
        self._busy = self._forward = 0.0
        self._quiet = not busy
        fields: dict[str, Any] = {**counts}
        return Stats(
            **fields,
            gen_throughput=self.last_throughput,
            cache_hit_rate=planner["cache_hit_rate"],
            preemptions=planner["preemptions"],
            out_of_memory=self.out_of_memory,
            prefill_tokens=self.prefill_tokens,
            prefill_seconds=self.prefill_seconds,
            pictures_encoded=self.encoded,
            pictures_found=self.found,
            step=self.steps,
            outside_forward=outside,
        )
