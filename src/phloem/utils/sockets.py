"""Sockets to listen on, and what is sent over slow ones."""

from __future__ import annotations

import errno
import socket

from phloem.core.errors import ConfigError

PIECE = 1 << 20  # bytes that are written at once


def bind(host: str, port: int, option: str = "") -> socket.socket:
    """A bound socket; port 0 takes a free one. `option`: that says both, where host and port do not.

    Raises:
        ConfigError: the address is taken, not ours, or not allowed.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # the latter: what no name can be
        name = option or "host"
        raise ConfigError(f"{name}: {host!r} is no address to listen on: {error}", param=name) from None
    found = socket.socket(family, kind, proto)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        reasons = {
            errno.EADDRINUSE: f"port {port} on {host} is in use: choose another with --port, or 0 for a free one",
            errno.EACCES: f"port {port} needs privileges: choose one above 1023 with --port",
            errno.EADDRNOTAVAIL: f"{host} is no address of this machine: choose another with --host",
        }
        if option:
            why = {errno.EADDRINUSE: "in use", errno.EADDRNOTAVAIL: "no address of this machine"}
            message = f"{option}: {host}:{port} is {why.get(error.errno or 0, f'not to be had: {error.strerror}')}"
            raise ConfigError(message, param=option) from None
        message = reasons.get(error.errno or 0, f"cannot listen on {host}:{port}: {error}")
        raise ConfigError(message, param="host" if error.errno == errno.EADDRNOTAVAIL else "port") from None
    return found


def send_steadily(sock: socket.socket, data: bytes | memoryview) -> None:
    """All of it. The socket's time-out is how long the peer may take nothing: how long all of it takes is a matter of
    the network, which `sendall` counts as well. Raises OSError."""
    view, at = memoryview(data), 0
    while at < len(view):
        at += sock.send(view[at : at + PIECE])
