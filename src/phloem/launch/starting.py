"""How long each phase of an engine's start took, whichever kind of engine it is."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from phloem.core.messages import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.core.messages import FromEngine


class Starting:
    """Phases that follow each other from now on. The door is told of each when it has ended; `seconds` keeps them."""

    def __init__(self, send: Callable[[FromEngine], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._send, self._begun = send, perf_counter()

    def end(self, phase: str) -> None:
        """It took the time since the end of the one before."""
        now = perf_counter()
        self.took(phase, now - self._begun)
        self._begun = now

    def took(self, phase: str, seconds: float) -> None:
        """It ended, and somebody else has measured it."""
        self.seconds[phase] = seconds
        self._send(Progress(phase=phase, seconds=seconds))
