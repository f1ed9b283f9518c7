"""The machines that the ranks of one model lie on: as many ranks on each, in the order of ranks."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from phloem.core.config import Config


@dataclass(frozen=True, slots=True)
class Nodes:
    """`size` machines, of which this is number `rank`, with `each` ranks. `host`, `port`: where node 0 listens."""

    size: int = 1
    rank: int = 0
    each: int = 1
    host: str = ""
    port: int = 0

    @staticmethod
    def of(config: Config) -> Nodes:
        """As the settings say.

        Raises:
            ConfigError: ranks that cannot be shared out, a node that does not exist, or no address to meet at.
        """
        nodes, runtime = config.nodes, config.runtime
        size, world, rank = nodes.nnodes, runtime.pp_size * runtime.tp_size, nodes.node_rank or 0
        if nodes.use_ray and rank:
            why = "Ray starts the other nodes: node_rank is for those that are started by hand"
            raise ConfigError(f"use_ray: {why}", param="use_ray")
        if rank >= size:
            many = f"there are {size} nodes (nnodes), 0 to {size - 1}" if size > 1 else "nnodes is 1"
            raise ConfigError(f"node_rank {rank}: {many}", param="node_rank")
        if size == 1:
            return Nodes(each=world)
        if world % size:
            valid = ", ".join(str(count) for count in range(1, world + 1) if world % count == 0)
            sizes = f"{world} ranks (tp_size {runtime.tp_size} x pp_size {runtime.pp_size})"
            raise ConfigError(f"nnodes {size}: {sizes} cannot be shared out; valid: {valid}", param="nnodes")
        if runtime.dp_size > 1:
            why = f"dp_size {runtime.dp_size}: each replica is on one machine; use `phloem router` for several"
            raise ConfigError(f"nnodes {size}: {why}", param="nnodes")
        if nodes.dist_init_addr is None and nodes.use_ray:
            return Nodes(size, rank, world // size)  # Ray knows this machine's address (`launch.ray_nodes`)
        if nodes.dist_init_addr is None:
            raise ConfigError(f"nnodes {size}: dist_init_addr, HOST:PORT of node 0, is needed", param="dist_init_addr")
        host, port = address_of(nodes.dist_init_addr)
        if host == "*" or _every(host):
            why = f"{host} is every address of a machine: name the one at which others reach node 0"
            raise ConfigError(f"dist_init_addr: {why}", param="dist_init_addr")
        return Nodes(size, rank, world // size, host, port)

    def ranks(self, node: int) -> range:
        """Those of a node."""
        return range(node * self.each, (node + 1) * self.each)

    def apart(self, ranks: tuple[int, ...]) -> bool:
        """Whether these ranks are on several machines."""
        return len({rank // self.each for rank in ranks}) > 1


def _every(host: str) -> bool:
    """Whether this is, in any spelling, the number of every address of a machine."""
    try:
        numbers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False  # a name
    return str(numbers[0][4][0]).removeprefix("::ffff:") in ("0.0.0.0", "::")


def address_of(text: str, name: str = "dist_init_addr") -> tuple[str, int]:
    """(host, port) of HOST:PORT, or [HOST]:PORT. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("tcp://").removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ConfigError(f"{name}: {text!r} is not HOST:PORT", param=name)
    return host, int(port)


def address_text(host: str, port: int) -> str:
    """HOST:PORT, or [HOST]:PORT, as `address_of` reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
