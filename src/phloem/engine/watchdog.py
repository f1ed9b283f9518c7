"""Prints the stacks of all threads when a step hangs."""

from __future__ import annotations

import faulthandler
import sys
import threading
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable

_log = log.get("engine.watchdog")


class Busy(Protocol):
    """A runner."""

    @property
    def busy_since(self) -> float: ...


class Watchdog:
    """Looks at the runner every second or so; reports each hanging step once, also to `hung` with how long it runs."""

    def __init__(self, runner: Busy, timeout: float, hung: Callable[[float], None] = lambda seconds: None) -> None:
        self._runner, self._hung = runner, hung
        self._timeout = timeout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="phloem-watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        reported = 0.0
        while not self._stop.wait(min(1.0, self._timeout / 4)):
            since = self._runner.busy_since
            if since and since != reported and perf_counter() - since > self._timeout:
                reported = since
                _log.error("a step has been running for %.0f s; stacks of all threads follow", perf_counter() - since)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                self._hung(perf_counter() - since)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
