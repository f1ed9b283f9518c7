"""When Python looks for garbage."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def left_alone() -> Generator[None]:
    """Nothing is looked through within: of what a start imports and builds nearly all stays, and looking through it
    again and again takes time. It is frozen at the end, with the cycles that died meanwhile: nobody looks again."""
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if looks:
            gc.enable()
