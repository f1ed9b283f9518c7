"""A rank's end of the socket between it and the process that has started it."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from phloem.core.config import Config, log_format
from phloem.core.errors import PhloemError
from phloem.launch.child import Said
from phloem.utils import log, machine
from phloem.utils.ipc import READ_BYTES, Frames, frame
from phloem.utils.processes import die_with_parent

_log = log.get("launch")


class RankPipe:
    """Args: the number of the descriptor that it was given."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._frames = Frames()
        self._ahead: list[bytes] = []

    def say(
        self,
        what: str,
        why: str = "",
        *,
        bytes_read: int = 0,
        seconds: float = 0.0,
        number: int = 0,
        memory: tuple[int, int] | None = None,
    ) -> None:
        self._socket.sendall(frame(msgspec.msgpack.encode(Said(what, why, bytes_read, seconds, number, memory))))

    def next(self) -> bytes | None:
        """The next message; None when the other end has gone."""
        while not self._ahead:
            data = self._socket.recv(READ_BYTES)
            if not data:
                return None
            self._ahead += self._frames.cut(data)
        return self._ahead.pop(0)


def ordered() -> tuple[dict[str, Any], Config, int] | None:
    """(The order on standard input, its settings, which rank this is); None: nobody is there to give one."""
    # Both may reach the whole process group at once, and while nodes are waited for; the first rank ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line:
        return None
    order: dict[str, Any] = msgspec.json.decode(line)
    die_with_parent(order["parent"])
    config, rank = Config.from_flat(order["config"]), order["rank"]
    log.configure(config.server.log_level, f"rank {rank}", log_format())
    return order, config, rank


def carried_out(work: Callable[[], None], pipe: RankPipe) -> int:
    """The process's status; the first rank is told why the work has failed."""
    try:
        work()
    except Exception as error:
        reason = machine.exhausted(error) or str(error)
        if not isinstance(error, PhloemError):
            _log.exception("this rank stops")
            reason = f"{type(error).__name__}: {reason}"
        with contextlib.suppress(OSError):  # the first rank has gone
            pipe.say("failed", reason)
        return 1
    return 0
