"""What every test begins with."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes side by side: more threads of torch than one in each spin in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def log_is_as_it_was() -> Iterator[None]:
    """An engine in this process configures the product's log: the next test must not find it so."""
    log = logging.getLogger("phloem")
    before = log.propagate, log.level, list(log.handlers)
    log.propagate = True
    yield
    log.propagate, log.level = before[0], before[1]
    log.handlers[:] = before[2]
