"""Child processes that end with their parent, whatever ends it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def killed_with_parent(parent: int) -> None:
    """The part of `die_with_parent` that reads nothing: what comes on standard input is still the caller's."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def die_with_parent(parent: int, stdin_fd: int = 0) -> None:
    """In a child: be killed when the parent ends. `parent` is its process id, `stdin_fd` a pipe that it keeps open.

    Linux tells us by a signal at once; elsewhere, and when the parent had gone before we asked, the pipe's end does.
    """
    killed_with_parent(parent)

    def watch() -> None:
        while os.read(stdin_fd, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="phloem-parent-watch", daemon=True).start()


class Stopped:
    """Whether a child is stopped by a signal (SIGSTOP), as it is looked at again and again.

    It must be seen so at several looks while this process runs: after Ctrl-Z and `fg` the parent may come first.
    """

    LOOKS, APART = 4, 0.2  # so many looks, that many seconds apart at least

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._count, self._last = clock, 0, 0.0

    def seen(self, pid: int) -> bool:
        """Look. False where the system does not tell."""
        now = self._clock()
        if self._count and now - self._last < self.APART:
            return self._count >= self.LOOKS
        self._last = now
        self._count = self._count + 1 if _is_stopped(pid) else 0
        return self._count >= self.LOOKS


def _is_stopped(pid: int) -> bool:
    try:
        found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except (AttributeError, OSError):  # it has ended and was waited for, or this system has no such call
        return False
    return found is not None and found.si_pid == pid and found.si_code == os.CLD_STOPPED
