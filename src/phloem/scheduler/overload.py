"""Requests that are refused before they wait: the queue is full, or too long for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from phloem.core.errors import QueueFull

if TYPE_CHECKING:
    from phloem.scheduler.metrics import Meter
    from phloem.scheduler.policies import WaitingQueue
    from phloem.scheduler.settings import ScheduleSettings
    from phloem.scheduler.state import Slots

RATE_SECONDS = 0.1  # of steps with prompts, before which their rate says nothing


def predicted_wait(queue: WaitingQueue, slots: Slots, meter: Meter) -> float:
    """Seconds until a request that came now would be computed: the prompts before it, at the rate of the steps with
    prompts so far. Cached prefixes count as computed anew. 0: nothing waits, or nothing was measured yet."""
    if meter.prefill_seconds <= RATE_SECONDS or not meter.prefill_tokens:
        return 0.0
    tokens = sum(request.num_prompt for request in queue.everything())
    tokens += sum(max(0, one.num_prompt - int(slots.computed[one.slot])) for one in slots.active_requests())
    return tokens * meter.prefill_seconds / meter.prefill_tokens


def check(settings: ScheduleSettings, waiting: int, queue: WaitingQueue, slots: Slots, meter: Meter) -> None:
    """Raises QueueFull for a request that comes now. `waiting`: requests."""
    if waiting >= settings.max_queued_requests:
        raise QueueFull(f"the queue is full: {waiting} requests are waiting")
    most = settings.max_queue_seconds
    if most > 0 and (wait := predicted_wait(queue, slots, meter)) > most:
        text = f"the prompts before it take {wait:.1f} s, and none waits longer than {most:g} s (max_queue_seconds)"
        error = QueueFull(text)
        error.retry_after = math.ceil(wait - most)
        raise error
