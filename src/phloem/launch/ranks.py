"""The processes of ranks 1 and up, as rank 0 sees them: started and ended by it, told by a socket each.

A rank that ends takes all with it: what it held of the model and of the cache is lost. Its end is seen at once by a
thread that waits for it, which lets nobody wait in a collective any longer; rank 0 then raises `EngineDead`, with which
rank it was and how it ended, and the process of rank 0 ends like an engine that died.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from phloem.core.config import child_environment
from phloem.core.errors import EngineDead, PhloemError
from phloem.core.resolve import Decision
from phloem.distributed.choose import choose, connect
from phloem.distributed.groups import Groups
from phloem.engine.parallel import End, LostStep, Team, Told, encode_told, mesh_of, ranks_of
from phloem.launch.process import MALLOC
from phloem.utils import log
from phloem.utils.ipc import READ_BYTES, Frames, frame
from phloem.utils.processes import Stopped

if TYPE_CHECKING:
    from phloem.core.config import Config

_log = log.get("launch")

MEMORY = "/dev/shm"
START_SECONDS = 120.0  # how long a rank may take to import what it needs
LEAVE_SECONDS = 3.0  # how long ranks get to end by themselves
PREFIX = "phloem-ranks-"
OLD_SECONDS = 3600.0  # a folder of a start that was killed: others are gone once all ranks are there
LOOK = 0.25  # seconds between looks at ranks that may be stopped
LAST_WORDS = 0.5  # seconds in which a broken collective may be explained by the end of a rank


class Ranks(Protocol):
    """All ranks but the first."""

    @property
    def team(self) -> Team: ...

    def check(self) -> None:
        """Raises EngineDead, with the reason, when a rank has gone."""
        ...

    def explain(self, error: EngineDead) -> EngineDead:
        """What a collective raised, or the end of the rank that was behind it."""
        ...

    def close(self) -> None:
        """End them."""
        ...


def join(config: Config, rank: int, name: str, place: Path) -> Groups:
    """A rank's ends of all its groups, by `shm` or `gloo`; `place`: a folder that all of them know."""
    runtime, patience = config.runtime, config.schedule.watchdog_timeout
    return Groups.join(
        rank,
        runtime.pp_size,
        runtime.tp_size,
        lambda group, at: connect(name, at, len(group.members), place / group.name, patience),
    )


def sweep(place: Path) -> None:
    """Remove what starts that were killed have left there; what cannot be removed is another user's."""
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time() - folder.stat().st_mtime > OLD_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


class Said(msgspec.Struct, frozen=True):
    """What a rank says of itself: `here`, `loaded`, or `failed` and why."""

    what: str
    why: str = ""
    bytes_read: int = 0  # of the checkpoint's files


class _Rank:
    """One process, and the thread that listens to it until it ends."""

    def __init__(self, order: dict[str, Any], rank: int, ended: Any) -> None:
        self.rank = rank
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        order = {**order, "rank": rank, "pipe": theirs.fileno(), "parent": os.getpid()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "phloem.launch.rank"],
            stdin=subprocess.PIPE,
            env=child_environment(MALLOC),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(order) + b"\n")
        self.process.stdin.flush()
        self.said: set[str] = set()
        self.bytes_read = 0
        self.news = threading.Condition()
        self._ended = ended
        self._thread = threading.Thread(target=self._listen, name=f"phloem-rank-{rank}", daemon=True)
        self._thread.start()

    def patience(self, seconds: float) -> None:
        """How long a message may take to be sent: a rank that is stopped reads none."""
        self._ours.settimeout(seconds)

    def send(self, data: bytes) -> None:
        """Raises OSError when the rank has gone, or does not read."""
        self._ours.sendall(data)

    def _listen(self) -> None:
        frames, why = Frames(), ""
        # A descriptor of its own: the other one has a time-out.
        with socket.socket(fileno=os.dup(self._ours.fileno())) as ear:
            ear.setblocking(True)
            while True:
                try:
                    data = ear.recv(READ_BYTES)
                except BlockingIOError:
                    continue
                except OSError:
                    break
                if not data:
                    break
                for item in frames.cut(data):
                    said = msgspec.msgpack.decode(item, type=Said)
                    why = said.why or why
                    with self.news:
                        self.said.add(said.what)
                        self.bytes_read = max(self.bytes_read, said.bytes_read)
                        self.news.notify_all()
        code = self.process.wait()
        self._ended(self, why or f"its process ({self.process.pid}) {_how(code)}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._thread.join(timeout=LEAVE_SECONDS)
        self._ours.close()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()


class RankProcesses:
    """Ranks 1 to n - 1, started at once; `team` is there when all of them have come.

    Raises:
        EngineDead: one of them ended before that.
    """

    def __init__(self, config: Config) -> None:
        self.size = ranks_of(config)
        # In memory where there is such a place: what ranks share must not be written to a disk.
        folder = MEMORY if os.access(MEMORY, os.W_OK) else None
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        sweep(self._folder.parent)
        self._sending, self._closing, self._cause = threading.Lock(), False, ""
        self._groups: Groups | None = None
        self.bytes_read: list[int] = []  # by each rank, of the checkpoint's files, once all have loaded
        self.ranks: list[_Rank] = []
        self._watcher = threading.Thread(target=self._watch, name="phloem-ranks", daemon=True)
        name, why = choose(config.runtime.tp_comm)
        order = {"config": config.flat(), "place": str(self._folder), "comm": name}
        try:
            self.ranks += [_Rank(order, rank, self._lost) for rank in range(1, self.size)]
            self._all_said("here", START_SECONDS)
            for rank in self.ranks:
                rank.patience(config.schedule.watchdog_timeout)
            groups = self._groups = join(config, 0, name, self._folder)
            self._watcher.start()
        except BaseException:
            self.close()
            raise
        shutil.rmtree(self._folder, ignore_errors=True)  # all have what lay there open
        self.team = Team(mesh_of(config, 0), groups, self.tell, self._loaded, decision_of(config, name, why))

    def tell(self, told: Told) -> None:
        """To every rank, from any thread. Raises EngineDead when one has gone."""
        data = frame(encode_told(told))
        with self._sending:
            self.check()
            for rank in self.ranks:
                try:
                    rank.send(data)
                except OSError as error:
                    raise self.explain(EngineDead(f"rank {rank.rank} takes no message: {error}")) from None

    def check(self) -> None:
        if self._cause:
            raise EngineDead(self._cause)

    def explain(self, error: EngineDead) -> EngineDead:
        if isinstance(error, LostStep):
            return error
        until = monotonic() + LAST_WORDS
        while not self._cause and monotonic() < until:
            threading.Event().wait(0.01)
        return EngineDead(self._cause) if self._cause else error

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(PhloemError, OSError):
            self.tell(End())
        until = monotonic() + (0.0 if self._cause or self._groups is None else LEAVE_SECONDS)
        while monotonic() < until and any(rank.process.poll() is None for rank in self.ranks):
            threading.Event().wait(0.01)
        for rank in self.ranks:
            rank.close()
        if self._groups is not None:
            self._groups.abort()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _loaded(self, bytes_read: int) -> None:
        self._all_said("loaded", None)
        self.bytes_read = [bytes_read, *(rank.bytes_read for rank in self.ranks)]

    def _all_said(self, what: str, timeout: float | None) -> None:
        until = None if timeout is None else monotonic() + timeout
        for rank in self.ranks:
            with rank.news:
                while what not in rank.said:
                    self.check()
                    if until is not None and monotonic() > until:
                        raise EngineDead(f"rank {rank.rank} of {self.size} has not come within {timeout:g} s")
                    rank.news.wait(0.2)

    def _lost(self, rank: _Rank, why: str) -> None:
        """In the thread of a rank that has ended."""
        if self._closing or self._cause:
            return
        self._cause = f"rank {rank.rank} of {self.size} has gone: {why}"
        _log.error("%s; all ranks end", self._cause)
        if self._groups is not None:
            self._groups.abort()

    def _watch(self) -> None:
        """In a thread: a rank that was stopped does nothing, and says nothing of it."""
        stopped = {rank.rank: Stopped() for rank in self.ranks}
        while not (self._closing or self._cause):
            for rank in self.ranks:
                if stopped[rank.rank].seen(rank.process.pid):
                    self._lost(rank, f"its process ({rank.process.pid}) was stopped by a signal")
            threading.Event().wait(LOOK)


def decision_of(config: Config, name: str, why: str) -> Decision:
    """What is printed of the ranks: how many, and by what they meet."""
    runtime = config.runtime
    parts = [f"{runtime.pp_size} stages of layers (pp_size)"] if runtime.pp_size > 1 else []
    parts += [f"experts over {runtime.ep_size} of them (ep_size)"] if runtime.ep_size > 1 else []
    parts += [f"ranks meet by {name} ({why}), so that steps are not recorded", "rank 0 chooses the tokens"]
    return Decision("tp_size", runtime.tp_size, "; ".join(["as asked", *parts]))


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
