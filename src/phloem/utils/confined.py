"""A child process for work on what strangers send, under limits of time and memory, and its face in the parent.

Decoders and compilers written in C know no bounds of their own: a file of a kilobyte may ask for hours or gigabytes.
The child is started at the first use and again after its end. Frames both ways: four bytes of length, then msgpack.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_FRAME = 1 << 30
_START_SECONDS = 180.0  # importing libraries takes seconds on a busy machine; not part of a job's time


class Confined:
    """One child; jobs one at a time, which the caller sees to.

    Args:
        module: whose `main` the child runs: it reads the first frame, answers it, and then calls `serve`.
        hello: the first frame.
    """

    def __init__(self, module: str, hello: dict[str, Any]) -> None:
        self._module, self._hello = module, hello
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> bool:
        """Whether it runs, started if need be."""
        if self._child is not None and self._child.poll() is None:
            return True
        self.close()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {self._module} import main; main()"
        self._child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self.ask(self._hello, _START_SECONDS) is not None

    def ask(self, body: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """Its answer; None where it died or did not answer in time, and was killed."""
        child = self._child
        if child is None:
            return None
        timer = threading.Timer(timeout, child.kill)
        timer.daemon = True
        timer.start()
        answer = None
        try:
            assert child.stdin is not None and child.stdout is not None
            _write(child.stdin, body)
            answer = _read(child.stdout)
        except (OSError, ValueError):  # the last: closed meanwhile
            pass
        finally:
            timer.cancel()
            if answer is None:
                self.close()
        return answer

    def kill(self) -> None:
        """End it, from any thread: whoever waits for an answer gets None."""
        if (child := self._child) is not None:
            child.kill()

    def close(self) -> None:
        """By the thread that asks."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


# in the child


def hello() -> dict[str, Any] | None:
    """The first frame."""
    return _read(sys.stdin.buffer)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]], memory: int, seconds: int) -> None:
    """Answer jobs until the pipe ends.

    Args:
        memory: bytes beyond those that libraries have mapped already; the address space counts (Linux).
        seconds: after which a job ends the process, whether or not its parent is still there.
    """
    if sys.platform == "linux":
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _write(sys.stdout.buffer, {"ready": True})
    while (job := _read(sys.stdin.buffer)) is not None:
        signal.alarm(seconds)
        made = answer(job)
        signal.alarm(0)
        _write(sys.stdout.buffer, made)


def _write(pipe: IO[bytes], body: dict[str, Any]) -> None:
    data = msgspec.msgpack.encode(body)
    pipe.write(struct.pack("<I", len(data)))
    pipe.write(data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> dict[str, Any] | None:
    head = pipe.read(4)
    if len(head) < 4:
        return None
    length = struct.unpack("<I", head)[0]
    if length > _MAX_FRAME:
        return None
    data = pipe.read(length)
    return msgspec.msgpack.decode(data) if len(data) == length else None
