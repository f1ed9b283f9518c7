"""Memory that two processes of one machine share: decode makes it, prefill writes pages into it, nothing is sent.

The memory is a sealed file without a name (`memfd_create`), handed over on a Unix socket. It can neither shrink nor
grow, so that no peer can take it away from under a copy; only processes of the same user are let in.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import socket
import struct
from typing import TYPE_CHECKING

import numpy as np

from phloem.disagg.wire import LinkLost

if TYPE_CHECKING:
    from phloem.disagg.transports import Row
    from phloem.disagg.wire import Link

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PEER = struct.Struct("3i")  # process, user, group


class Shared:
    """Rows in shared memory, of either side. It goes with the last who has it mapped."""

    def __init__(self, fd: int, row_bytes: int, count: int) -> None:
        self._fd = fd
        block = np.frombuffer(mmap.mmap(fd, max(1, row_bytes * count)), np.uint8)[: row_bytes * count]
        self._block = block.reshape(count, row_bytes)

    def greet(self, link: Link, seconds: float) -> None:
        try:
            link.sock.settimeout(seconds)
            socket.send_fds(link.sock, [b"m"], [self._fd])
        except OSError as error:
            raise LinkLost(f"the peer takes no memory: {error.strerror or error}") from None
        self.forget()

    def take(self, link: Link, start: int, count: int, seconds: float) -> None:
        pass

    def row(self, index: int) -> Row:
        return self._block[index]

    def rows(self, start: int, count: int) -> list[Row]:
        return list(self._block[start : start + count])

    def push(self, link: Link, start: int, count: int, seconds: float) -> None:
        pass

    def forget(self) -> None:
        """The file's number is needed no more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        self.forget()
        self._block = np.empty((0, 0), np.uint8)


class Transport:
    name, near = "shm", True

    def listen(self, host: str) -> tuple[socket.socket, str]:
        name = f"phloem-kv-{secrets.token_hex(16)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("\0" + name)
        sock.listen(256)
        return sock, name

    def connect(self, address: str, host: str, seconds: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            sock.connect("\0" + address)
            _check_user(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def receiver(self, row_bytes: int, count: int) -> Shared:
        fd = os.memfd_create("phloem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, max(1, row_bytes * count))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return Shared(fd, row_bytes, count)
        except BaseException:
            os.close(fd)
            raise

    def sender(self, link: Link, row_bytes: int, count: int, seconds: float) -> Shared:
        try:
            _check_user(link.sock)
            link.sock.settimeout(seconds)
            _, fds, _, _ = socket.recv_fds(link.sock, 1, 1)
        except OSError as error:
            raise LinkLost(f"no memory came: {error.strerror or error}") from None
        if len(fds) != 1:
            raise LinkLost("no memory came")
        try:
            whole = os.fstat(fds[0]).st_size >= row_bytes * count
            sealed = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not whole or not sealed:
                raise LinkLost("the memory that came is too small, or could shrink")
            found = Shared(fds[0], row_bytes, count)
        except OSError as error:
            os.close(fds[0])
            raise LinkLost(f"the memory that came is of no use: {error.strerror or error}") from None
        except BaseException:
            os.close(fds[0])
            raise
        found.forget()
        return found


def _check_user(sock: socket.socket) -> None:
    """Raises PermissionError for a process of somebody else."""
    _, user, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if user != os.getuid():
        raise PermissionError("the peer is a process of another user")
