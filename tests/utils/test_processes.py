"""What is known of child processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from phloem.utils.processes import Stopped


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="this system has no waitid")
def test_a_child_that_is_stopped_is_told_from_one_that_runs_or_goes_on() -> None:
    now = [100.0]
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        looks = Stopped(lambda: now[0])

        def look(seconds: float = 0.25) -> bool:
            now[0] += seconds
            return looks.seen(child.pid)

        assert not any(look() for _ in range(8))
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(0.1)
        assert [look() for _ in range(5)] == [False, False, False, True, True]
        os.kill(child.pid, signal.SIGCONT)
        time.sleep(0.1)
        assert not any(look() for _ in range(5))
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(0.1)
        assert not look(3600.0), "one look is not enough, however long ago the last one was"
        assert not any(look(0.01) for _ in range(8)), "nor are many at once"
    finally:
        child.kill()
        child.wait()
    assert not look()
    assert not Stopped().seen(os.getpid()), "no child"
