"""Log lines: time, level, where, what. One format for every process of a server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import perf_counter

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"


def get(name: str) -> logging.Logger:
    """The logger `phloem.<name>`."""
    return logging.getLogger(f"phloem.{name}")


def configure(level: str, role: str = "") -> None:
    """Send our log lines to standard error; `role` marks the lines of a child process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{role + ' ' if role else ''}{FORMAT}", datefmt="%H:%M:%S"))
    root = logging.getLogger("phloem")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


class Phases:
    """How long each step of start-up took, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        start = perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items())


def progress(to: logging.Logger, what: str, name: str) -> Callable[[str, float], None]:
    """What logs a part's name and the share that is done, at most every two seconds."""
    last = perf_counter()

    def note(part: str, share: float) -> None:
        nonlocal last
        if perf_counter() - last > 2:
            last = perf_counter()
            to.info("%s %s: %3.0f %% (%s)", what, name, share * 100, part)

    return note
