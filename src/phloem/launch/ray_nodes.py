"""The further nodes of one start of an engine by Ray: where they are is Ray's to say, when they end is told here."""

from __future__ import annotations

import importlib.util
import secrets
import socket
import threading
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError, EngineDead
from phloem.core.nodes import Nodes, address_of, address_text
from phloem.launch.child import Child, Said

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.core.config import Config

START_SECONDS = 60.0  # that Ray's own start may take, beside `dist_timeout` for a place
LEAVE_SECONDS = 5.0  # that it gets to give back what it has


class RayNodes:
    """Asks for a place, waits for it, and lets Ray start nodes there. `config` is then the engine's: with an address at
    which node 0 listens and a secret, those of this start alone, so that no node of an earlier one is let in.

    Args:
        lost: called once, in a thread, with the reason for which a node or Ray itself has gone.

    Raises:
        ConfigError: Ray is not installed, no cluster runs, or it has no room in time.
    """

    def __init__(self, config: Config, lost: Callable[[str], None]) -> None:
        if not installed():
            why = "Ray is not installed: pip install 'phloem[ray]', on every node"
            raise ConfigError(f"use_ray: {why}", param="use_ray")
        nodes = Nodes.of(config)
        self._lost, self._closing = lost, False
        self._changed, self._placed, self._why = threading.Condition(), "", ""
        given, secret = config.nodes.dist_init_addr, config.nodes.dist_secret or secrets.token_hex(16)
        port = address_of(given)[1] if given else _free_port()
        # Of a node of this start: another start has others.
        flat = {**config.flat(), "use_ray": False, "dist_secret": secret, "max_engine_restarts": 0}
        order: dict[str, Any] = {
            "config": flat, "nodes": nodes.size, "each": nodes.each, "port": port, "seconds": config.nodes.dist_timeout,
            "given": given,
        }  # fmt: skip
        self._driver = Child(0, self._heard, self._ended, "phloem.launch.ray_driver")
        self._driver.begin(order)
        try:
            here = self._wait(config.nodes.dist_timeout + START_SECONDS)
        except BaseException:
            self.close()
            raise
        self.config = config.with_(dist_init_addr=given or address_text(here, port), dist_secret=secret)

    def _wait(self, seconds: float) -> str:
        with self._changed:
            self._changed.wait_for(lambda: self._placed or self._why, seconds)
        if self._why:
            raise ConfigError(f"use_ray: {self._why}", param="use_ray")
        if not self._placed:
            raise EngineDead(f"use_ray: Ray has not answered within {seconds:g} s")
        return self._placed

    def close(self) -> None:
        """Let go of what Ray has given; whatever it has started ends."""
        self._closing = True
        self._driver.leave(LEAVE_SECONDS)

    # --- in the thread that listens to it

    def _heard(self, _: Child, said: Said) -> None:
        if said.what == "placed":
            with self._changed:
                self._placed = said.why
                self._changed.notify_all()

    def _ended(self, _: Child, why: str) -> None:
        with self._changed:
            self._why = why
            early = not self._placed
            self._changed.notify_all()
        if not (early or self._closing):
            self._lost(f"use_ray: {why}")


def installed() -> bool:
    """Whether Ray is there; it is not imported here."""
    return importlib.util.find_spec("ray") is not None


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]
