"""What the scheduler does about what requests are promised (`tempo.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.scheduler.chunks import Price
from phloem.scheduler.tempo import STEPS, Tempo, promise, stand_back

if TYPE_CHECKING:
    from phloem.core.batch import Batch
    from phloem.core.targets import Targets
    from phloem.scheduler.metrics import Meter
    from phloem.scheduler.planner import Planner
    from phloem.scheduler.state import Request


class Service:
    """`planner` has a `Tempo` from the first request on that needs one, and learns what tokens of long prompts cost."""

    def __init__(self, planner: Planner, meter: Meter, targets: Targets) -> None:
        self._planner, self._meter, self._targets = planner, meter, targets

    def accept(self, request: Request) -> None:
        """Before it gets its place in the queue."""
        submit = request.submit
        promise(request, self._targets.of(submit.tier, submit.ttft, submit.itl), self._seconds())
        if request.itl and self._planner.tempo is None:
            self._planner.tempo = Tempo()
            self._planner.learn_price()

    def turn(self, now: float) -> None:
        """Before a step is planned."""
        if self._planner.policy.due and len(self._planner.queue):
            meter = self._meter
            step = meter.forward_total / meter.steps if meter.steps else 0.0
            stand_back(self._planner.queue, now + STEPS * step, self._seconds())

    def saw(self, batch: Batch, seconds: float) -> None:
        planner = self._planner
        if planner.tempo is not None:
            planner.tempo.saw(batch, seconds, Price() if planner.chunks is None else planner.chunks.price)

    def _seconds(self) -> float:
        """That a token of a prompt takes, whether or not the cache has it."""
        return self._meter.seconds_a_token * self._planner.fresh
