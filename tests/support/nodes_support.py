"""Several nodes of one model on this machine: a command line each."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

from served import eventually


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class FurtherNode:
    """A `phloem serve --node-rank 1` process; `lines` are what it has printed on either stream."""

    def __init__(self, model: Path | str, *arguments: str, rank: int = 1) -> None:
        command = [sys.executable, "-m", "phloem", "serve", str(model), "--node-rank", str(rank), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def joined(self) -> int:
        """How often it has joined node 0."""
        return sum("has joined" in line for line in self.lines)

    def wait(self, seconds: float = 60) -> int:
        """Its exit status, once it has ended by itself and all it said is there."""
        status = self.process.wait(seconds)
        eventually(lambda: self.process.stdout is None or self.process.stdout.closed or bool(self.lines), 5)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def options(port: int, **settings: object) -> list[str]:
    """As arguments, with two nodes that meet at this port."""
    found = {"nnodes": 2, "dist_init_addr": f"127.0.0.1:{port}", **settings}
    return [text for name, value in found.items() for text in (f"--{name.replace('_', '-')}", str(value))]
