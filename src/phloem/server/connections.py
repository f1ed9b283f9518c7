"""What is looked at once a second: connections that never become a request, and whether sockets are left."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from phloem.utils import machine

log = logging.getLogger("phloem.server")


class SilentConnections:
    """Closes connections on which no whole header comes in time. Bodies have a limit of their own, and a connection
    between two requests uvicorn's."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._since: dict[Any, tuple[Any, float]] = {}  # connection -> its last request, and since when it waits

    def close(self, connections: Iterable[Any], now: float) -> None:
        """`connections`: uvicorn's protocols."""
        waiting: dict[Any, tuple[Any, float]] = {}
        for connection in connections:
            if _waits(connection):
                last, since = self._since.get(connection, (None, now))
                waiting[connection] = (connection.cycle, since if last is connection.cycle else now)
        self._since = waiting
        for connection, (_, since) in waiting.items():
            if now - since > self._timeout:
                connection.transport.close()


def _waits(connection: Any) -> bool:
    """Whether a header is due: the first one, or one of which a part has come."""
    cycle = connection.cycle
    return cycle is None or (cycle.response_complete and connection.timeout_keep_alive_task is None)


class FreeSockets:
    """Tells once when the process may open no more files: libuv then drops new connections in silence."""

    def __init__(self) -> None:
        self._told = False

    def look(self, connections: int) -> None:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            if not self._told:
                log.error(
                    "no more connections can be taken: %d are open, and the system allows this process %s files "
                    "(raise it with `ulimit -n`)",
                    connections,
                    machine.open_files(),
                )
            self._told = True
            return
        if self._told:
            log.info("connections are taken again")
        self._told = False
