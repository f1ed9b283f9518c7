"""Children of scripts/gpu_check.py: started, listened to, and ended in time with everything that they started.

Needs nothing but Python: what watches must not be able to break by what it watches. A child tells by lines of JSON
behind `DATA` on its standard output; its other lines are passed on. Everything that it starts carries a mark in its
environment, by which it is found again, whoever its parent is by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = "@@ "
MARK, PART = "PHLOEM_GPU_CHECK_MARK", "PHLOEM_GPU_CHECK_PART"  # of a section's processes, and of some of those
PATIENCE = 4.0  # seconds between asking processes to end and ending them
MEMORY = Path("/dev/shm")
_OURS = re.compile(r"phloem-[a-z]+-(\d+)\.")
_PYTHON = ("phloem-", "psm_", "torch_", "sem.", "nccl-")  # as this engine, Python, torch and NCCL name theirs

Say = Callable[[dict[str, Any]], None]


def marked(mark: str, kind: str = MARK) -> list[int]:
    """Processes that carry the mark and have not ended."""
    wanted, found = f"{kind}={mark}\0".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (place / "environ").read_bytes() and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


def end(mark: str, patience: float = PATIENCE, kind: str = MARK) -> list[str]:
    """End what carries the mark; gives what had to be ended, by its command line."""
    told: dict[int, str] = {}
    until = time.monotonic() + patience
    for how in (signal.SIGTERM, signal.SIGKILL):
        while left := marked(mark, kind):
            for pid in left:
                if pid not in told or how == signal.SIGKILL:
                    told.setdefault(pid, _line(pid))
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, how)
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        until += patience
    return list(told.values())


def _line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    return f"process {pid}"


def in_memory() -> set[str]:
    """Names in the memory that processes share."""
    with contextlib.suppress(OSError):
        return set(os.listdir(MEMORY))
    return set()


def forget(before: set[str], alone: bool) -> list[str]:
    """Remove what has come to shared memory since, and give the names: where the machine is ours `alone` whatever such
    programs make, else what processes of this engine left that have gone. Drivers' files stay."""
    found: list[str] = []
    for name in sorted(in_memory() - before):
        ours = _OURS.match(name)
        gone = ours is not None and not Path(f"/proc/{ours[1]}").exists()
        if gone or (alone and name.startswith(_PYTHON)):
            with contextlib.suppress(OSError):
                shutil.rmtree(MEMORY / name) if (MEMORY / name).is_dir() else (MEMORY / name).unlink()
                found.append(name)
    return found


class Child:
    """A process in a session of its own, and what it says."""

    def __init__(self, command: list[str], mark: str, environment: dict[str, str], say: Callable[[str], None]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
        self._mark, self._say = mark, say
        self._told: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**environment, MARK: mark, "PYTHONUNBUFFERED": "1"},
            text=True,
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(DATA):
                with contextlib.suppress(ValueError):
                    self._told.put(json.loads(line[len(DATA) :]))
            else:
                self._say(line.rstrip("\n"))
        self._told.put(None)

    def ask(self, what: dict[str, Any]) -> None:
        """Give it a line; a child that has ended hears nothing, which `told` finds."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def told(self, seconds: float) -> dict[str, Any] | None:
        """What it tells next; None: it says nothing more. Raises TimeoutError."""
        try:
            return self._told.get(timeout=max(0.01, seconds))
        except queue.Empty:
            raise TimeoutError from None

    def why(self, hung: float | None = None) -> str:
        """Why it ended, or with `hung` (seconds) where it stood when it was ended; "" if it ended well."""
        if hung is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)  # it writes its stacks
            time.sleep(0.3)
            self.close()
            return f"not done after {hung:.0f} s; {self.stood()}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        code = self.process.returncode
        if code is None:
            self.close()
            return "it closed its output and did not end"
        if code == 0:
            return ""
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{how}: {self.tail()}"

    def stood(self, most: int = 700) -> str:
        """The stack that it wrote when it was asked, innermost first; else the end of its errors."""
        *_, found = ("", *self._errors(1 << 16).split("Current thread")[1:])
        return _joined("Current thread" + found)[:most] if found else self.tail()

    def tail(self, most: int = 700) -> str:
        """The end of what it wrote as errors."""
        return _joined(self._errors(most))

    def _errors(self, most: int) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - most))
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """End it, if it has not ended, without asking."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)


def _joined(text: str) -> str:
    return " | ".join(line.strip() for line in text.split("\n") if line.strip())


def watch(child: Child, seconds: float, heard: Say, silent: Callable[[], None] = lambda: None) -> str:
    """Listen to a child for so long; gives why it went wrong, "" if it did not. It has ended then. `silent` is called
    where it says nothing for a second."""
    until = time.monotonic() + seconds
    while time.monotonic() <= until:
        try:
            told = child.told(min(1.0, until - time.monotonic()))
        except TimeoutError:
            silent()
            continue
        if told is None:
            return child.why()
        heard(told)
    return child.why(hung=seconds)


class Pool:
    """Children that answer one question after another. One that dies, or says nothing for `patience` seconds, costs its
    question; another takes its place.

    Args:
        start: makes a child, whose first line is `{"ready": names}`, of what it can be asked, or `{"missing": why}`
            where it cannot work.
        until: `time.monotonic()` after which nothing is asked any more.
    """

    def __init__(self, start: Callable[[], Child], size: int, patience: float, until: float) -> None:
        self._start, self._size, self._patience, self._until = start, size, patience, until
        self._lock = threading.Lock()
        self._open: deque[dict[str, Any]] = deque()
        self._named = False
        self.asked = 0
        self.broken = ""  # why no child starts
        self.missing = ""

    def run(
        self,
        questions: Callable[[list[str]], list[dict[str, Any]]],
        answered: Callable[[dict[str, Any], dict[str, Any] | str], None],
    ) -> int:
        """Ask everything that `questions` makes of the names of the first child; `answered` gets each with its answer,
        or why there is none. Gives how many were not asked."""
        threads = [
            threading.Thread(target=self._work, args=(questions, answered), daemon=True) for _ in range(self._size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(1.0, self._until + self._patience + 2 * PATIENCE - time.monotonic()))
        return len(self._open)

    def _work(self, questions: Callable[[list[str]], list[dict[str, Any]]], answered: Callable[..., None]) -> None:
        child: Child | None = None
        try:
            while not self.broken and time.monotonic() < self._until:
                if child is None:
                    child, names = self._started()
                    with self._lock:
                        if child is not None and not self._named:
                            self._named = True
                            self._open.extend(questions(names))
                with self._lock:
                    if child is None or not self._open:
                        return
                    question = self._open.popleft()
                    self.asked += 1
                answer = self._asked(child, question)
                with self._lock:
                    answered(question, answer)
                if isinstance(answer, str) or answer.get("dead"):
                    child.close()
                    child = None
        finally:
            if child is not None:
                child.close()

    def _started(self) -> tuple[Child | None, list[str]]:
        child = self._start()
        try:
            told = child.told(min(self._patience, max(1.0, self._until - time.monotonic())))
            why = (child.why() or "it ended") if told is None else ""
        except TimeoutError:
            told, why = None, child.why(hung=self._patience)
        if told is not None and "missing" not in told:
            return child, list(told["ready"])
        child.close()
        self.missing = told["missing"] if told is not None else ""
        self.broken = why or f"missing: {self.missing}"
        return None, []

    def _asked(self, child: Child, question: dict[str, Any]) -> dict[str, Any] | str:
        patience = min(self._patience, max(5.0, self._until - time.monotonic()))
        child.ask(question)
        try:
            told = child.told(patience)
        except TimeoutError:
            return child.why(hung=patience)
        return told if told is not None else (child.why() or "it ended without an answer")
