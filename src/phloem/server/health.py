"""Is the engine able to serve? The truth about the engine, not about the door."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phloem.client.client import EngineClient

IDLE_SILENCE = 20.0  # seconds: an idle engine beats every second; a machine under load may be late
GRACE = 2.0  # beyond the watchdog's limit: a beat may be on its way


class Health:
    """Judges by the link, the readiness message, and the loop's own heartbeat."""

    def __init__(self, client: EngineClient, watchdog: float) -> None:
        self.client = client
        self.watchdog = watchdog

    def hung(self) -> float:
        """For how many seconds a ready engine has given no sign of life, or its loop has been in one step."""
        link = self.client.connection
        if self.client.dead is not None or link.ready is None:
            return 0.0
        return time.monotonic() - link.heard_at + max(link.heartbeat.busy_seconds, 0.0)

    def problem(self) -> str | None:
        """Why the server cannot serve now; None when it can."""
        client, link = self.client, self.client.connection
        if client.dead is not None:
            return client.dead
        if client.draining:
            return "the server is shutting down"
        if link.ready is None:
            return "the engine is starting"
        if client.unfit:
            return client.unfit
        silence = time.monotonic() - link.heard_at
        busy = link.heartbeat.busy_seconds
        if busy + silence > self.watchdog + GRACE and busy > 0:
            return f"a step has been running for {busy + silence:.0f} s"
        # A step holds the loop, and with it the heartbeat: silence means little while requests are in flight.
        limit = self.watchdog + GRACE if client.in_flight else min(IDLE_SILENCE, self.watchdog + GRACE)
        if silence > limit:
            return f"the engine has been silent for {silence:.0f} s"
        return None
