"""What every test gets."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _log_as_found() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """A command that a test or a fixture of a whole file runs sets the log up for good; `caplog` would see nothing."""
    logger = logging.getLogger("phloem")
    before = list(logger.handlers)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)  # which also forgets what is cached of levels
    yield
    logger.handlers[:] = before
