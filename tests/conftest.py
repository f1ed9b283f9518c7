"""What every test gets."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _log_as_found() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """A command that a test runs sets the log up for good; the next test's `caplog` would see nothing."""
    logger = logging.getLogger("phloem")
    before = logger.propagate, logger.level, list(logger.handlers)
    yield
    logger.propagate, logger.level, logger.handlers[:] = before
