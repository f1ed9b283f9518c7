"""An engine process that begins before it is known what it will serve.

What it imports (torch) is most of a start, and the same whatever the options say: it runs beside the door's own imports
and its reading of options. `begin` starts such a process, the first engine that is wanted takes it (`take`), and one
that nobody took is ended (`close`). This file imports little: what it imports is waited for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from phloem.core.config import child_environment

# For glibc's allocator in the engine process: a step's buffers are taken again by the next step instead of being given
# back to the system, whose fresh pages cost as much as a tenth of a prefill; and they may lie on huge pages.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True, eq=False)
class Begun:
    """A process that imports, then waits for its order on standard input, and our end of the pipe to it."""

    process: subprocess.Popen[bytes]
    pipe: socket.socket

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.pipe.close()


_waiting: list[Begun] = []  # at most one


def start() -> Begun:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:  # its only other end is the engine's: its end is ours to see
        process = subprocess.Popen(
            [sys.executable, "-m", "phloem.launch", str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.PIPE,
            env=child_environment(MALLOC),
            pass_fds=[theirs.fileno()],
        )
    return Begun(process, ours)


def begin() -> None:
    if not _waiting:
        _waiting.append(start())


def take() -> Begun:
    """The process that has begun, or one that begins now."""
    while _waiting:
        begun = _waiting.pop()
        if begun.process.poll() is None:
            return begun
        begun.close()
    return start()


def close() -> None:
    while _waiting:
        _waiting.pop().close()
