"""A rank's process as the one that started it sees it: rank 0's on node 0, the node's own elsewhere. Without torch."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from phloem.core.config import child_environment
from phloem.launch.early import MALLOC
from phloem.utils import leftovers
from phloem.utils.ipc import READ_BYTES, Frames
from phloem.utils.processes import Stopped

LEAVE_SECONDS = 3.0  # how long ranks get to end by themselves
LOOK = 0.25  # seconds between looks at ranks that may be stopped


class Said(msgspec.Struct, frozen=True):
    """What a rank says of itself: `here`, `loaded`, `measured`, `busy` for so many seconds, `failed` and why; and of
    models that draw `done`, or `broke` and why, of the pass of that number."""

    what: str
    why: str = ""
    bytes_read: int = 0  # of the checkpoint's files
    seconds: float = 0.0
    number: int = 0
    memory: tuple[int, int] | None = None  # (free, all) bytes of its own device, beside the largest step


Heard = Callable[["Child", Said], None]
Ended = Callable[["Child", str], None]


class Child:
    """One process, and the thread that listens to it until it ends. It imports torch, and then waits for its order.

    Args:
        rank: its number in the world.
        heard: called in that thread, with what it says.
        ended: called once with the reason, at its end or as soon as it says that it has failed.
        module: what is run.
    """

    def __init__(self, rank: int, heard: Heard, ended: Ended, module: str = "phloem.launch.rank") -> None:
        self.rank = rank
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pipe = theirs.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            env=child_environment(MALLOC),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._heard, self._ended, self._over = heard, ended, False
        self._thread = threading.Thread(target=self._listen, name=f"phloem-rank-{rank}", daemon=True)
        self._thread.start()

    def begin(self, order: dict[str, Any]) -> None:
        """Let it begin, as the order says; its end is told by `ended` where it has come already."""
        order = {**order, "rank": self.rank, "pipe": self._pipe, "parent": os.getpid()}
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(msgspec.json.encode(order) + b"\n")
            self.process.stdin.flush()

    def patience(self, seconds: float) -> None:
        """How long a message may take to be sent: a rank that is stopped reads none."""
        self._ours.settimeout(seconds)

    def send(self, data: bytes) -> None:
        """Raises OSError when the rank has gone, or does not read."""
        self._ours.sendall(data)

    def hush(self) -> None:
        """Let nobody wait any longer for it to take a message: it never will."""
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)  # one direction alone wakes nobody who polls

    def _listen(self) -> None:
        try:
            self._hear()
        except Exception as error:  # who is not listened to is not waited for
            self._end(f"what it says is not understood ({type(error).__name__}: {error})")
        code = self.process.wait()
        self._end(f"its process ({self.process.pid}) {how_ended(code)}")

    def _end(self, why: str) -> None:
        """Tell its end, once."""
        if not self._over:
            self._over = True
            self._ended(self, why)

    def _hear(self) -> None:
        """Until nothing more can come."""
        frames = Frames()
        # A descriptor of its own, which outlives the other; it waits by `poll`, for that one's time-out is its too.
        with socket.socket(fileno=os.dup(self._ours.fileno())) as ear:
            ready = select.poll()
            ready.register(ear, select.POLLIN)
            while True:
                ready.poll()
                try:
                    data = ear.recv(READ_BYTES)
                except BlockingIOError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                for item in frames.cut(data):
                    said = msgspec.msgpack.decode(item, type=Said)
                    if said.what == "failed":  # its process may take minutes to end: threads of it wait for others
                        self._end(said.why)
                    self._heard(self, said)

    def leave(self, seconds: float) -> None:
        """Tell it that nothing comes any more, and close when it has ended, or after so long."""
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.close()

    def close(self) -> None:
        self.hush()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._thread.join(timeout=LEAVE_SECONDS)
        self._ours.close()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()


def watch(children: Sequence[Child], over: Callable[[], bool], stopped: Ended) -> None:
    """Until it is over: a rank that was stopped does nothing, and says nothing of it."""
    looks = {child.rank: Stopped() for child in children}
    while not over():
        for child in children:
            if looks[child.rank].seen(child.process.pid):
                stopped(child, f"its process ({child.process.pid}) was stopped by a signal")
                child.hush()
        threading.Event().wait(LOOK)


def end(children: Sequence[Child], seconds: float) -> None:
    """Wait that long for those that were told to end, and end the others."""
    until = monotonic() + seconds
    while monotonic() < until and any(child.process.poll() is None for child in children):
        threading.Event().wait(0.01)
    for child in children:
        child.close()


def meeting_place() -> Path:
    """A new folder for what a node's ranks share: in memory where there is such a place, for it must not be written
    to a disk. What starts that were killed have left is removed."""
    leftovers.sweep()
    return Path(tempfile.mkdtemp(prefix=leftovers.prefix("ranks"), dir=leftovers.in_memory()))


def how_ended(code: int) -> str:
    """By its exit status, which is negative for a signal."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
