"""The ranks of a model as rank 0 sees them: processes beside it, started and ended by it, and those of further nodes.

A rank that ends takes all with it: what it held of the model and of the cache is lost. Its end is seen at once by a
thread that waits for it, which lets nobody wait in a collective any longer; rank 0 then raises `EngineDead`, with which
rank it was and how it ended, and the process of rank 0 ends like an engine that died.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, Protocol

from phloem import platforms
from phloem.checkpoint.describe import described
from phloem.core.errors import ConfigError, EngineDead, PhloemError
from phloem.core.nodes import Nodes
from phloem.core.resolve import Decision
from phloem.distributed.choose import choose, connect, on_host
from phloem.distributed.comm import Board, Gloo
from phloem.distributed.groups import Groups
from phloem.distributed.nccl import Nccl
from phloem.distributed.shm import SharedMemory
from phloem.engine.ranks import cards
from phloem.engine.ranks.parallel import Busy, End, LostStep, Team, Told, encode_told, mesh_of, ranks_of
from phloem.launch.agree import facts_of
from phloem.launch.child import LEAVE_SECONDS, Child, Said, end, meeting_place, watch
from phloem.launch.node import tell_lead
from phloem.launch.nodes import FurtherNodes, Node, listening_beside
from phloem.launch.ray_nodes import RayNodes
from phloem.launch.ring import RingWriter
from phloem.launch.wire import Echo
from phloem.utils import log
from phloem.utils.ipc import frame

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from phloem.core.config import Config
    from phloem.distributed.comm import Comm
    from phloem.distributed.groups import Group
    from phloem.launch.wire import Word

_log = log.get("launch")

START_SECONDS = 120.0  # how long a rank may take to import what it needs
SECOND_LEAD = 3.0  # that node 0 may take to hear of another node 0
ANSWER_SECONDS = 30.0  # that one may take to answer behind its steps
LOOK = 0.1  # seconds between looks at ranks that are waited for
LAST_WORDS = 0.5  # seconds in which a broken collective may be explained by the end of a rank

Phase = Literal["start", "serving", "drained"]  # how far an engine had come when it ended


class Ranks(Protocol):
    """All ranks but the first."""

    @property
    def team(self) -> Team: ...

    def check(self) -> None:
        """Raises EngineDead, with the reason, when a rank has gone."""
        ...

    def hung(self, seconds: float) -> None:
        """A step takes longer than any should."""
        ...

    def explain(self, error: EngineDead) -> EngineDead:
        """What a collective raised, or the end of the rank that was behind it."""
        ...

    def close(self, phase: Phase = "drained", why: str = "") -> None:
        """End them. `why`: what has ended the engine."""
        ...


@dataclass(frozen=True)
class Way:
    """By what a rank finds the others of its groups.

    Args:
        comm: `shm` or `gloo`, for groups whose ranks are all on this node; `nccl`: for all groups.
        place: a folder that all ranks of this node know.
        board: (host, port) where ranks of several nodes find each other; None: there is one node.
        here: this machine's address, as other nodes reach it.
        listening: of rank 0, its socket there.
    """

    comm: str
    place: Path
    board: tuple[str, int] | None = None
    here: str = ""
    listening: socket.socket | None = None


def join(config: Config, rank: int, way: Way) -> Groups:
    """A rank's ends of all its groups. Raises EngineDead where others do not come."""
    runtime, patience, nodes = config.runtime, config.schedule.watchdog_timeout, Nodes.of(config)
    board = None if way.board is None else Board(*way.board, START_SECONDS, way.listening)

    device = cards.take(config, rank) if way.comm == Nccl.name else None  # in this thread

    def end_of(group: Group, at: int) -> Comm:
        size, beside = len(group.members), f"{group.name}.{Nccl.name}"
        if board is None or not nodes.apart(group.members):
            host = connect(on_host(way.comm), at, size, way.place / group.name, patience)
            store: Any = way.place / beside
        else:
            host = Gloo(at, size, board.part(group.name), patience, way.here)
            store = board.part(beside)
        return host if device is None else Nccl(at, size, store, device, patience, host)

    return Groups.join(rank, runtime.pp_size, runtime.tp_size, end_of, runtime.attn_dp_size * runtime.attn_cp_size)


class _News:
    """What ranks have said so far, by rank."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.said: set[tuple[int, str]] = set()
        self.bytes_read: dict[int, int] = {}
        self.busy: dict[int, float] = {}
        self.memory: list[tuple[int, int]] = []  # of further nodes, whose ranks have their weights
        self.devices: list[tuple[int, int]] = []  # of ranks with a device each, beside the largest step

    def add(
        self, rank: int, what: str, bytes_read: int, memory: tuple[int, int] | None = None, seconds: float = 0.0
    ) -> None:
        with self.changed:
            self.said.add((rank, what))
            self.busy[rank] = max(seconds, self.busy.get(rank, 0.0))
            self.bytes_read[rank] = max(bytes_read, self.bytes_read.get(rank, 0))
            kept = self.devices if what == "measured" else self.memory
            kept += [] if memory is None else [memory]
            self.changed.notify_all()


class RankProcesses:
    """Ranks 1 to n - 1, those of this node started at once; `team` is there when all of them have come.

    Raises:
        ConfigError: a further node does not come, or has something else than this one.
        EngineDead: one of them ended before that.
    """

    def __init__(self, config: Config) -> None:
        self.size = ranks_of(config)
        self._folder: Path | None = None  # where those of this node meet, until all have
        self._sending, self._closing, self._cause = threading.Lock(), False, ""
        self._ring: RingWriter | None = None  # of what those of this node are told; None: by their sockets
        self._groups: Groups | None = None
        self._further: FurtherNodes | None = None
        self._placed = RayNodes(config, self._unplaced) if config.nodes.use_ray else None
        config = config if self._placed is None else self._placed.config
        self._news, self._nodes = _News(), Nodes.of(config)
        self._measures = False  # each has a device, whose memory it measures
        self.bytes_read: list[int] = []  # by each rank, of the checkpoint's files, once all have loaded
        self.ranks: list[Child] = []  # of this node
        self._watcher = threading.Thread(target=self._watch, name="phloem-ranks", daemon=True)
        try:
            facts = platforms.facts_of(platforms.named(config.runtime.device))
            name, why = choose(config.runtime.tp_comm, meets=facts.meets)
            self._measures = name == Nccl.name
            self._further = self._listen(config)
            groups = self._groups = self._meet(config, name)
        except BaseException as error:
            self.close("start", str(error))
            raise
        self._forget_place()  # all have what lay there open
        decision = decision_of(config, name, why)
        self.team = Team(mesh_of(config, 0), groups, self.tell, self._loaded, decision, self._least_memory)

    def _listen(self, config: Config) -> FurtherNodes | None:
        if self._nodes.size == 1:
            return None
        facts = facts_of(config, described(config.model))
        try:
            return FurtherNodes(config, self._nodes, facts, self._heard_of, self._lost)
        except ConfigError as error:  # another node may have said that it is node 0
            why = f"{error.message}; node_rank says, or leaves out, that this is node 0"
            tell_lead(config, why, SECOND_LEAD)
            raise ConfigError(why, param=error.param) from None

    def _meet(self, config: Config, name: str) -> Groups:
        for rank in self._nodes.ranks(0)[1:]:
            self.ranks.append(Child(rank, self._heard, self._ended))
        self._watcher.start()
        further = self._further
        if further is not None:
            further.wait()
        # Not before: nodes are waited for long, and the door ends an engine that starts by force.
        place = self._folder = meeting_place()
        way = Way(name, place)
        if further is not None:
            sock, port = listening_beside(self._nodes.host)
            here = sock.getsockname()[0]
            way = Way(name, place, (here, port), here, sock)
        order: dict[str, Any] = {
            "config": config.flat(), "place": str(place), "comm": name, "board": way.board, "here": way.here,
            "ring": None,
        }  # fmt: skip
        if on_host(name) == SharedMemory.name and self.ranks:
            ring, readers = place / "told", len(self.ranks)
            self._ring = RingWriter(ring, readers, self._wake, config.schedule.watchdog_timeout)
            order["ring"] = str(ring), readers
        try:
            for rank in self.ranks:
                rank.begin(order)
            if further is not None and way.board is not None:
                further.begin(name, way.board[1])
            self._all_said("here", START_SECONDS)
            for rank in self.ranks:
                rank.patience(config.schedule.watchdog_timeout)
            return self._joined(config, way)
        finally:
            if way.listening is not None:
                way.listening.close()

    def _joined(self, config: Config, way: Way) -> Groups:
        """Rank 0's ends. In a thread of its own, which waits for ranks that do not come as long as gloo lets it: they
        may have gone meanwhile. Raises EngineDead."""
        found: Future[Groups] = Future()

        def work() -> None:
            try:
                found.set_result(join(config, 0, way))
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=work, name="phloem-join", daemon=True).start()
        while not wait([found], LOOK).done:
            self.check()
        return found.result()

    def tell(self, told: Told) -> None:
        """To every rank, from any thread. Raises EngineDead when one has gone."""
        data = encode_told(told)
        with self._sending:
            self.check()
            if self._further is not None:
                self._further.tell(data)
            try:
                if self._ring is not None:
                    self._ring.write(data, self.check)
                    return
                framed = frame(data)
                for rank in self.ranks:
                    rank.send(framed)
            except OSError as error:
                raise self.explain(EngineDead(f"a rank takes no message: {error}")) from None

    def _wake(self, reader: int, data: bytes) -> None:
        self.ranks[reader].send(data)

    def busy(self) -> dict[int, float]:
        """Seconds in which the stages of the other ranks of this node have computed, once all have done what they were
        told. Raises EngineDead when one has gone."""
        with self._news.changed:
            self._news.said -= {(rank, "busy") for rank in range(self.size)}
        self.tell(Busy())
        self._all_said("busy", ANSWER_SECONDS, [rank.rank for rank in self.ranks])
        return dict(self._news.busy)

    def check(self) -> None:
        if self._cause:
            raise EngineDead(self._cause)

    def hung(self, seconds: float) -> None:
        """Ranks that meet on their hosts find it by themselves; a card waits for ever."""
        if self._measures:
            self._lost(f"a step has been running for {seconds:.0f} s (watchdog_timeout): the card of a rank hangs")

    def explain(self, error: EngineDead) -> EngineDead:
        if isinstance(error, LostStep):
            return error
        until = monotonic() + LAST_WORDS
        while not self._cause and monotonic() < until:
            threading.Event().wait(0.01)
        return EngineDead(self._cause) if self._cause else error

    def close(self, phase: Phase = "drained", why: str = "") -> None:
        if self._closing:
            return
        self._closing = True
        why = self._cause or why or ("" if phase == "drained" else "the engine of node 0 has ended")
        with contextlib.suppress(PhloemError, OSError):
            if phase == "drained":
                self.tell(End())
        if self._further is not None:
            self._further.close(why, phase == "serving")
        end(self.ranks, LEAVE_SECONDS if phase == "drained" and not self._cause else 0.0)
        if self._groups is not None:
            self._groups.abort()
        if self._placed is not None:
            self._placed.close()
        self._forget_place()

    def _forget_place(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _loaded(self, bytes_read: int) -> None:
        self._all_said("loaded", None)
        self.bytes_read = [bytes_read, *(self._news.bytes_read[rank] for rank in range(1, self.size))]

    def _least_memory(self) -> tuple[int, int] | None:
        if self._measures:
            self._all_said("measured", None)
        found = self._news.devices if self._measures else self._news.memory
        return (min(free for free, _ in found), min(total for _, total in found)) if found else None

    def _all_said(self, what: str, timeout: float | None, ranks: Sequence[int] = ()) -> None:
        until, news = None if timeout is None else monotonic() + timeout, self._news
        for rank in ranks or range(1, self.size):
            with news.changed:
                while (rank, what) not in news.said:
                    self.check()
                    if until is not None and monotonic() > until:
                        raise EngineDead(f"rank {rank} of {self.size} has not come within {timeout:g} s")
                    news.changed.wait(0.2)

    # --- in threads of those who tell of it

    def _heard(self, rank: Child, said: Said) -> None:
        self._news.add(rank.rank, said.what, said.bytes_read, said.memory, said.seconds)

    def _heard_of(self, node: Node, word: Word | Echo) -> None:
        if isinstance(word, Echo):
            return
        if word.what == "gone":
            self._lost(f"rank {word.rank} of {self.size} has gone, on {node.name}: {word.why}")
        else:
            self._news.add(word.rank, word.what, word.bytes_read, word.memory)

    def _ended(self, rank: Child, why: str) -> None:
        self._lost(f"rank {rank.rank} of {self.size} has gone: {why}")

    def _unplaced(self, why: str) -> None:
        if self._further is not None:
            self._further.fail(why)
        self._lost(why)

    def _lost(self, cause: str) -> None:
        if self._closing or self._cause:
            return
        self._cause = cause
        if self._further is not None:
            self._further.end()
        _log.error("%s; all ranks end", cause)
        if self._groups is not None:
            self._groups.abort()

    def _watch(self) -> None:
        watch(self.ranks, lambda: bool(self._closing or self._cause), self._ended)


def decision_of(config: Config, name: str, why: str) -> Decision:
    """What is printed of the ranks: how many, and by what they meet."""
    runtime, nodes, carded = config.runtime, Nodes.of(config), name == Nccl.name
    parts = [f"{runtime.pp_size} stages of layers (pp_size)"] if runtime.pp_size > 1 else []
    parts += [f"experts over {runtime.ep_size} of them (ep_size)"] if runtime.ep_size > 1 else []
    if runtime.attn_dp_size > 1:
        parts.append(f"{runtime.attn_dp_size} groups of them attend to rows of their own (attn_dp_size)")
    if runtime.attn_cp_size > 1:
        parts.append(f"the tokens of a prompt over {runtime.attn_cp_size} of them (attn_cp_size)")
    if runtime.moe_a2a_backend != "none":
        parts.append("rows go to the ranks of their experts alone (moe_a2a_backend)")
    if nodes.size > 1:
        placed = ", placed by Ray" if config.nodes.use_ray else ""
        parts.append(f"{nodes.size} nodes (nnodes){placed}, whose ranks meet by {name if carded else 'gloo'}")
    where = "those of one" if nodes.size > 1 and not carded else "ranks"
    if carded:
        numbers = ", ".join(str(cards.card_of(config, rank)) for rank in nodes.ranks(0))
        parts.append(f"a graphics card each, here {numbers}")
    parts += [f"{where} meet by {name} ({why})", "rank 0 chooses the tokens"]
    return Decision("tp_size", runtime.tp_size, "; ".join(["as asked", *parts]))
