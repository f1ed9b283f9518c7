"""What every test begins with."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def log_is_as_it_was() -> Iterator[None]:
    """An engine in this process configures the product's log: the next test must not find it so."""
    log = logging.getLogger("phloem")
    before = log.propagate, log.level, list(log.handlers)
    log.propagate = True
    yield
    log.propagate, log.level = before[0], before[1]
    log.handlers[:] = before[2]
