"""Child processes that end with their parent, whatever ends it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, stdin_fd: int = 0) -> None:
    """In a child: be killed when the parent ends. `parent` is its process id, `stdin_fd` a pipe that it keeps open.

    Linux tells us by a signal at once; elsewhere, and when the parent had gone before we asked, the pipe's end does.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        while os.read(stdin_fd, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="phloem-parent-watch", daemon=True).start()
