"""Limits of a control group count; a child ends with its parent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from phloem.utils import cores, machine
from phloem.utils.cores import available_cores, bind_threads, cgroup_quota, core_groups


def test_the_quota_of_a_control_group_cuts_the_cores(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert cgroup_quota(membership, tmp_path) is None
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(membership, tmp_path) == 1.5
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_a_team_that_has_every_core_is_bound_and_no_other() -> None:
    mine = os.sched_getaffinity(0)
    groups = core_groups()
    assert set().union(*groups) == mine and sum(map(len, groups)) == len(mine)
    end, ids = threading.Event(), list[int]()

    def wait() -> None:
        ids.append(threading.get_native_id())
        end.wait(20)

    threads = [threading.Thread(target=wait) for _ in groups]
    for thread in threads:
        thread.start()
    try:
        while len(ids) < len(threads):
            time.sleep(0.001)
        assert not bind_threads(ids[:-1]) and not bind_threads([*ids, ids[0]])
        assert all(os.sched_getaffinity(thread) == mine for thread in ids)
        if len(groups) > 1:
            assert bind_threads(ids)
            assert [os.sched_getaffinity(thread) for thread in ids] == groups
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert os.sched_getaffinity(0) == mine
    assert not bind_threads([2**22 + 1 for _ in groups])  # no such threads


def test_hyperthreads_of_a_core_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_siblings", lambda cpu: str(cpu // 2))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5}, raising=False)
    assert core_groups() == [{0, 1}, {2}, {5}]
    assert not bind_threads([1, 2])


def test_the_limit_of_a_control_group_cuts_the_memory(tmp_path: Path) -> None:
    free, total = machine.memory(tmp_path)
    assert 0 < free <= total
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert machine.memory(tmp_path) == (700000, 1000000)


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import os, time
from phloem.utils.processes import die_with_parent
die_with_parent(int(os.environ["PARENT"]))
print("up", flush=True)
time.sleep(60)
'''], stdin=subprocess.PIPE, env={**__import__("os").environ, "PARENT": str(__import__("os").getpid())})
print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int) -> bool:
    try:
        return "zombie" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")
def test_a_child_does_not_outlive_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "up\n"
    assert not gone(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if gone(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child lives on")


def test_what_is_exhausted_is_named_with_what_helps() -> None:
    files = machine.exhausted(OSError(errno.EMFILE, "Too many open files"))
    assert files is not None and "ulimit -n" in files and str(machine.open_files()) in files
    for error in (MemoryError(), OSError(errno.ENOMEM, "no"), ImportError("x.so: failed to map segment from object")):
        found = machine.exhausted(error)
        assert found is not None and "--max-total-tokens" in found
    assert "written" in (machine.exhausted(OSError(errno.ENOSPC, "No space left on device")) or "")
    for error in (OSError(errno.ENOENT, "no such file"), RuntimeError("shapes differ"), ValueError("can")):
        assert machine.exhausted(error) is None


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_limit_of_address_space_cuts_the_memory() -> None:
    code = (
        "import resource\nfrom phloem.utils import machine\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "free, total = machine.memory()\n"
        "assert total <= 2**30 and 0 < free < 2**30, (free, total)\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (70, min(hard, 200)))\n"
        "machine.allow_open_files()\n"
        "assert machine.open_files() == 200, machine.open_files()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
