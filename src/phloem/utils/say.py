"""Lines for people, on standard output."""

from __future__ import annotations

import os
import sys

from phloem.utils import log

_log = log.get("output")


def say(text: str) -> None:
    """Print and flush. Where nothing can be written (a full disk) that is logged once, and what follows is dropped: a
    server that cannot greet still serves."""
    try:
        print(text, flush=True)
    except OSError as error:
        _log.warning("standard output cannot be written to: %s", error.strerror)
        mute()


def mute() -> None:
    """What is left for standard output, also at exit, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
