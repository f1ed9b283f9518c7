"""A further node that Ray has placed: an actor there starts the process that `--node-rank` by hand would be, and waits
for it. No step, no weight and no token goes through Ray."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import deque
from typing import Any

import msgspec

from phloem.core.config import Config
from phloem.core.errors import PhloemError
from phloem.launch import node
from phloem.launch.child import how_ended
from phloem.utils.processes import die_with_parent

LAST_LINES = 3  # of what it has printed, for whoever asks why it ended


class RayNode:
    """The actor. It is made of `config.flat()`, with the node's own `node_rank`; its process ends with it.

    `niceness`: of node 0's processes, which wait in every step for those that are started here.
    """

    def __init__(self, flat: dict[str, Any], niceness: int) -> None:
        as_urgent_as(niceness)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phloem.launch.ray_node"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: `watch` says how
            self._process.stdin.write(msgspec.json.encode({"config": flat, "parent": os.getpid()}).decode() + "\n")
            self._process.stdin.flush()

    def watch(self) -> str:
        """Until the process ends: "" where it has done its work, else how it ended and what it said last."""
        assert self._process.stdout is not None
        last: deque[str] = deque(maxlen=LAST_LINES)
        for line in self._process.stdout:
            print(line, end="", flush=True)  # into Ray's log of this node
            last.append(line.strip())
        code = self._process.wait()
        said = " | ".join(line for line in last if line)
        return f"its process {how_ended(code)}{': ' if said else ''}{said}" if code else ""


def as_urgent_as(niceness: int) -> None:
    """Let this process, and what it starts, yield to others no more than node 0's do: Ray starts its workers with a
    niceness of 15, behind all other work of a machine. Where that is not allowed it is said."""
    here = os.getpriority(os.PRIO_PROCESS, 0)
    if here <= niceness:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    except OSError as error:
        why = f"niceness {here}, node 0 has {niceness}: {error.strerror}"
        remedy = f"start Ray here with RAY_worker_niceness={niceness} in its environment"
        print(f"this node's ranks yield to other work ({why}), and all wait for them: {remedy}", flush=True)


def main() -> int:
    """The process: a node like one that is started by hand."""
    line = sys.stdin.buffer.readline()
    if not line:
        return 1
    order: dict[str, Any] = msgspec.json.decode(line)
    die_with_parent(order["parent"])
    try:
        return node.run(Config.from_flat(order["config"]))
    except PhloemError as error:
        print(error.message, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
