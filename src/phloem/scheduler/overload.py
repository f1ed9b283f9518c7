"""Requests that are refused before they wait: the queue is full, or too long for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from phloem.core.errors import QueueFull

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phloem.core.messages import Submit
    from phloem.scheduler.metrics import Meter
    from phloem.scheduler.policies import WaitingQueue
    from phloem.scheduler.settings import ScheduleSettings
    from phloem.scheduler.state import Request, Slots

ID_BYTES = 4
RATE_SECONDS = 0.1  # of steps with prompts, before which their rate says nothing


class Before(NamedTuple):
    """What a request that comes now has before it, by accounts that are kept as requests come and go. `fresh`: the
    share of all prompts so far that was computed, and not found in the cache."""

    queue: WaitingQueue
    slots: Slots
    meter: Meter
    fresh: float = 1.0

    def seconds(self, submit: Submit) -> float:
        """Until it would be computed: the prompts before it, at the rate of the steps with prompts so far. Those that
        wait are taken to be cached as much as others were. 0: nothing waits, or nothing was measured yet."""
        meter, slots = self.meter, self.slots
        if meter.prefill_seconds <= RATE_SECONDS or not meter.prefill_tokens:
            return 0.0
        tokens = self.fresh * self.queue.ahead(submit, len(submit.input_ids) // ID_BYTES)
        tokens += sum(max(0, one.num_prompt - int(slots.computed[one.slot])) for one in slots.active_requests())
        return tokens * meter.prefill_seconds / meter.prefill_tokens


def check(
    settings: ScheduleSettings, waiting: int, before: Before, submit: Submit, live: Mapping[str, Request]
) -> None:
    """Raises QueueFull for a request that comes now. `waiting`: requests.

    Of a call with several prompts or continuations the first one decides how long is too long: the others wait for
    their own kin, and where nobody else is there so would the same call whenever it came again.
    """
    if waiting >= settings.max_queued_requests and not before.queue.has_share(submit, settings.max_queued_requests):
        raise QueueFull(f"the queue is full: {waiting} requests are waiting")
    most = settings.max_queue_seconds
    if most > 0 and (wait := before.seconds(submit)) > most:
        if submit.call and any(request.submit.call == submit.call for request in live.values()):
            return
        text = f"the prompts before it take {wait:.1f} s, and none waits longer than {most:g} s (max_queue_seconds)"
        error = QueueFull(text)
        error.retry_after = math.ceil(wait - most)
        raise error
