"""A server of our own for the time of a benchmark: started on a free port, ended with the benchmark."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from time import perf_counter

from phloem.core.errors import PhloemError


@contextmanager
def own_server(arguments: Sequence[str]) -> Generator[tuple[str, float]]:
    """Run `phloem serve` with these arguments; gives its address and the seconds until it was ready."""
    start = perf_counter()
    command = [sys.executable, "-m", "phloem", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = re.search(r"at (http://\S+)$", line.strip())
            if found:
                yield found.group(1), perf_counter() - start
                return
        raise PhloemError(f"the server did not start: {' '.join(command)} ended with status {process.wait()}")
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
