"""Log lines: time, level, where, what. One format for every process of a server: text, or JSON for those that collect
lines (`PHLOEM_LOG_FORMAT=json`)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"


_FIELDS = "phloem_fields"  # of a record that has some


def fields(**values: Any) -> dict[str, Any]:
    """For `extra` of a log call: what a line of JSON has beside its message. Texts of clients are none of it."""
    return {_FIELDS: values}


class Lines(logging.Formatter):
    """An object of JSON in each line."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        found: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        if self._role:
            found["process"] = self._role
        found["message"] = record.getMessage()
        found |= vars(record).get(_FIELDS, {})
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


def get(name: str) -> logging.Logger:
    """The logger `phloem.<name>`."""
    return logging.getLogger(f"phloem.{name}")


def configure(level: str, role: str = "", form: str = "text") -> None:
    """Send our log lines to standard error; `role` marks the lines of a child process. `form`: text, or json
    (`core.config.log_format`)."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter(f"{role + ' ' if role else ''}{FORMAT}", datefmt="%H:%M:%S")
    handler.setFormatter(Lines(role) if form == "json" else text)
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
