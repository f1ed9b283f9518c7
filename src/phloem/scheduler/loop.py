"""The engine's main loop: receive, step, and a sign of life every second."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from phloem.core.messages import Heartbeat, Stopped, ToEngine
from phloem.core.request import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
STALLED_POLL = 0.002  # seconds to wait for something late (a compiling grammar) when nothing else moves


class InboxClosed(Exception):
    """Raised by `Inbox.poll` when no message can ever come again: the door has gone."""


class Inbox(Protocol):
    """Where messages to the engine come from."""

    def poll(self, timeout: float | None) -> list[ToEngine]:
        """Every message that is there; waits up to `timeout` seconds (None: without end) for the first one.

        Raises:
            InboxClosed: when the other side has gone.
        """
        ...


def run(scheduler: Scheduler, inbox: Inbox, on_beat: Callable[[Heartbeat], None] | None = None) -> None:
    """Serve until a `Drain` is carried out (then `Stopped` is sent) or the inbox closes.

    A `Heartbeat` is sent about every second, between steps; `on_beat` gets it too. While a step hangs there is none:
    its absence is the sign.
    """
    beat = Beat(scheduler, on_beat)
    moved = True
    while not scheduler.stopped:
        timeout = 0.0 if moved else STALLED_POLL if scheduler.busy else beat.seconds_left()
        try:
            messages = inbox.poll(timeout)
        except InboxClosed:
            log.warning("the door has gone: the engine ends")
            scheduler.abort_all(FinishReason("abort", message="the connection was lost", status_code=503))
            return
        for message in messages:
            scheduler.receive(message)
        moved = scheduler.step()
        beat.maybe()
    scheduler.flush_results()
    scheduler.send(Stopped())


class Beat:
    """Sends a heartbeat when one is due."""

    def __init__(self, scheduler: Scheduler, on_beat: Callable[[Heartbeat], None] | None) -> None:
        self._scheduler = scheduler
        self._on_beat = on_beat
        self._next = scheduler.clock()

    def seconds_left(self) -> float:
        return max(0.0, self._next - self._scheduler.clock())

    def maybe(self) -> None:
        now = self._scheduler.clock()
        if now < self._next:
            return
        self._next = now + BEAT_SECONDS
        message = Heartbeat(step=self._scheduler.meter.steps, busy_seconds=self._scheduler.busy_seconds)
        self._scheduler.send(message)
        if self._on_beat is not None:
            self._on_beat(message)
