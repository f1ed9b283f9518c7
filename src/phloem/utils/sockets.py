"""Sockets to listen on, and what is sent over slow ones."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
from pathlib import Path

from phloem.core.errors import ConfigError

PIECE = 1 << 20  # bytes that are written at once
# Seconds: of silence before the system asks the other end whether it is there, between such questions, and until a
# connection is given up whose other end answers nothing, be it asked or sent to. Systems answer, not processes: one
# that computes for minutes, or is stopped, is there.
IDLE, AGAIN, GIVEN_UP = 2, 1, 5


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


def descriptors() -> set[int]:
    """Those of this process that are sockets. Empty where the system does not tell."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.stat(Path("/proc/self/fd") / name).st_mode):
                    found.add(int(name))
    return found


def notice_cuts(numbers: set[int]) -> int:
    """Let the system end connections over TCP among these whose link is cut without a word, within `GIVEN_UP` seconds.
    Gives how many there are; 0 too where the system cannot."""
    if sys.platform != "linux":
        return 0
    done = 0
    for number in numbers:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as one:
            if one.type != socket.SOCK_STREAM or one.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            one.getpeername()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, AGAIN)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, (GIVEN_UP - IDLE) // AGAIN)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GIVEN_UP * 1000)
            done += 1
    return done
