"""A whole server as a process."""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil


class Server:
    """A `phloem serve` process; `lines` are what it has printed on either stream."""

    def __init__(self, model: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "phloem", "serve", str(model), "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            self._news.put(line)
        self._news.put(None)

    def wait_ready(self, timeout: float = 120) -> Server:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            line = self._news.get(timeout=max(0.1, end - time.monotonic()))
            assert line is not None, "the server ended:\n" + "\n".join(self.lines)
            found = re.search(r"at (http://127\.0\.0\.1:\d+)$", line.strip())
            if found:
                self.url = found.group(1)
                return self
        raise AssertionError("not ready in time:\n" + "\n".join(self.lines))

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def engine_pid(self) -> int:
        """0 where the engine has gone and the next one has not been started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, verify=False)  # else each call reads the system's certificates

    def generate(self, text: str, count: int = 4) -> httpx.Response:
        body = {"text": text, "sampling_params": {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}}
        return httpx.post(f"{self.url}/generate", json=body, timeout=60, verify=False)

    def state(self) -> dict[str, Any]:
        return self.get("/server_info").json()["internal_states"][0]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def eventually(check: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def ranks_of(pid: int) -> list[int]:
    """The processes of ranks that a process, or a thread of it, has started."""
    found: list[int] = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.Error):
            if "phloem.launch.rank" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def shared_folders() -> set[str]:
    """What ranks share memory in, while they start."""
    return {folder.name for folder in Path("/dev/shm").glob("phloem-ranks-*")}


def check_folders_gone(before: set[str]) -> None:
    """Those of another server on this machine go when its ranks have started; what is left behind stays."""
    new = shared_folders() - before
    eventually(lambda: not new & shared_folders(), 60)
