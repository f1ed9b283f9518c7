"""Memory that two processes of one machine share: decode makes it, prefill writes pages into it, nothing is sent.

The memory is a sealed file without a name (`memfd_create`), handed over on a Unix socket. It can neither shrink nor
grow, so that no peer can take it away from under a copy; only processes of the same user are let in.

The system clears fresh memory before it gives it, and finds a place for each page of it in each process: that takes
many times as long as the copy. So both sides keep what they have had. Decode uses memory again once every row of a
prompt has come: who wrote them writes there no more. Prefill keeps it mapped, and knows it by a number that decode
drew for it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import socket
import struct
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.disagg.wire import LinkLost

if TYPE_CHECKING:
    from phloem.disagg.transports import Row
    from phloem.disagg.wire import Link

Block = np.ndarray[Any, np.dtype[np.uint8]]  # flat

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PEER = struct.Struct("3i")  # process, user, group
NAME_BYTES = 16  # by which prefill knows memory again
GRAIN = 2 << 20  # sizes are multiples of it, so that what one prompt had fits the next
MOST_KEPT = 8  # blocks that a side keeps
MOST_KEPT_BYTES = 256 << 20  # of them


class Memory:
    """A block in shared memory. `key`: its file, and the number drawn for it."""

    def __init__(self, fd: int, nbytes: int, name: bytes) -> None:
        found = os.fstat(fd)
        self.key = found.st_dev, found.st_ino, name
        self.name, self.fd = name, fd
        self.block: Block = np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)

    @staticmethod
    def made(nbytes: int) -> Memory:
        fd = os.memfd_create("phloem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return Memory(fd, nbytes, secrets.token_bytes(NAME_BYTES))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """It goes with the last who has it mapped."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        self.block = np.empty(0, np.uint8)


class Kept:
    """Blocks that no prompt has now, the one that was given back last behind the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[int, int, bytes], Memory] = OrderedDict()

    def fitting(self, nbytes: int) -> Memory | None:
        """The smallest one of at least so many bytes, if that is not far too large."""
        with self._lock:
            sizes = [(len(one.block), key) for key, one in self._blocks.items() if len(one.block) >= nbytes]
            size, key = min(sizes, default=(0, None))
            return self._blocks.pop(key) if key is not None and size <= 4 * nbytes else None

    def known(self, key: tuple[int, int, bytes]) -> Memory | None:
        with self._lock:
            return self._blocks.pop(key, None)

    def keep(self, memory: Memory) -> None:
        """Others go for it, those first that were not used for longest."""
        with self._lock:
            self._blocks[memory.key] = memory
            while len(self._blocks) > MOST_KEPT or self.nbytes > MOST_KEPT_BYTES:
                self._blocks.popitem(last=False)[1].close()

    @property
    def nbytes(self) -> int:
        return sum(len(one.block) for one in self._blocks.values())


class Shared:
    """Rows in shared memory, of either side."""

    def __init__(self, memory: Memory, row_bytes: int, count: int, kept: Kept) -> None:
        self._memory: Memory | None = memory
        self._kept, self._count = kept, count
        self._block = memory.block[: row_bytes * count].reshape(count, row_bytes)

    def row(self, index: int) -> Row:
        return self._block[index]

    def rows(self, start: int, count: int) -> list[Row]:
        return list(self._block[start : start + count])

    def _let_go(self, whole: bool) -> None:
        self._block = np.empty((0, 0), np.uint8)
        memory, self._memory = self._memory, None
        if memory is not None and whole:
            self._kept.keep(memory)
        elif memory is not None:
            memory.close()


class Receiver(Shared):
    """`taken`: rows that have come."""

    taken = 0

    def greet(self, link: Link, seconds: float) -> None:
        assert self._memory is not None, "it was closed"
        try:
            link.sock.settimeout(seconds)
            socket.send_fds(link.sock, [self._memory.name], [self._memory.fd])
        except OSError as error:
            raise LinkLost(f"the peer takes no memory: {error.strerror or error}") from None

    def take(self, link: Link, start: int, count: int, seconds: float) -> None:
        self.taken += count

    def close(self) -> None:
        # Of rows that are still to come somebody may write some whenever he likes.
        self._let_go(whole=self.taken == self._count)


class Sender(Shared):
    """`pushed`: rows that have been written."""

    pushed = 0

    def push(self, link: Link, start: int, count: int, seconds: float) -> None:
        self.pushed += count

    def close(self) -> None:
        # Else decode does not use it again.
        self._let_go(whole=self.pushed == self._count)


class Transport:
    name, near = "shm", True

    def __init__(self) -> None:
        self._own, self._theirs = Kept(), Kept()

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

    def receiver(self, row_bytes: int, count: int) -> Receiver:
        size = max(1, -(-row_bytes * count // GRAIN)) * GRAIN
        memory = self._own.fitting(size) or Memory.made(size)
        return Receiver(memory, row_bytes, count, self._own)

    def sender(self, link: Link, row_bytes: int, count: int, seconds: float) -> Sender:
        try:
            _check_user(link.sock)
            link.sock.settimeout(seconds)
            name, fds, _, _ = socket.recv_fds(link.sock, NAME_BYTES, 1)
        except OSError as error:
            raise LinkLost(f"no memory came: {error.strerror or error}") from None
        if len(fds) != 1:
            raise LinkLost("no memory came")
        try:
            size = os.fstat(fds[0]).st_size
            sealed = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if size < max(1, row_bytes * count) or not sealed or len(name) != NAME_BYTES:
                raise LinkLost("the memory that came is too small, has no name, or could shrink")
            found = os.fstat(fds[0])
            memory = self._theirs.known((found.st_dev, found.st_ino, name)) or Memory(fds[0], size, name)
        except OSError as error:
            raise LinkLost(f"the memory that came is of no use: {error.strerror or error}") from None
        finally:
            os.close(fds[0])  # what is mapped stays
        memory.fd = -1
        return Sender(memory, row_bytes, count, self._theirs)


def _check_user(sock: socket.socket) -> None:
    """Raises PermissionError for a process of somebody else."""
    _, user, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if user != os.getuid():
        raise PermissionError("the peer is a process of another user")
