"""An engine process that begins before the options are read: who takes it, and that none is left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from phloem.launch import early


@pytest.fixture(autouse=True)
def none_waits() -> Iterator[None]:
    yield
    early.close()


def engines_of(door: int) -> list[psutil.Process]:
    """Engine processes that were started by a door."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if [*(one.info["cmdline"] or [])][1:3] == ["-m", "phloem.launch"]
            and one.info["cmdline"][-1] == str(door)]  # fmt: skip


def test_the_one_that_has_begun_is_taken_once() -> None:
    early.begin()
    early.begin()
    (waiting,) = engines_of(psutil.Process().pid)
    begun = early.take()
    other = early.take()
    try:
        assert begun.process.pid == waiting.pid
        assert other.process.pid != begun.process.pid and begun.process.poll() is None
    finally:
        begun.close()
        other.close()
    assert begun.process.returncode is not None and engines_of(psutil.Process().pid) == []


def test_one_that_has_ended_is_not_taken() -> None:
    early.begin()
    (waiting,) = engines_of(psutil.Process().pid)
    waiting.kill()
    waiting.wait(30)
    begun = early.take()
    try:
        assert begun.process.pid != waiting.pid and begun.process.poll() is None
    finally:
        begun.close()


def test_nobody_takes_it_and_it_is_ended() -> None:
    early.begin()
    (waiting,) = engines_of(psutil.Process().pid)
    early.close()
    assert not waiting.is_running()
    early.close()  # there is none any more


@pytest.mark.slow
def test_without_an_order_it_ends_by_itself() -> None:
    begun = early.start()
    assert begun.process.stdin is not None
    begun.process.stdin.close()
    assert begun.process.wait(120) == 1
    begun.pipe.close()


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--no-such-option"], 2), (["--port", "70000"], 1), (["--help"], 0)]
)
def test_a_command_that_serves_nothing_leaves_none_behind(arguments: list[str], status: int) -> None:
    command = [sys.executable, "-m", "phloem", "serve", "demo", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert process.wait(60) == status
        assert engines_of(process.pid) == []
