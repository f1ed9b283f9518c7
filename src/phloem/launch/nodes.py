"""The further nodes of a model, as node 0's engine process has them: it listens, lets them in, and hears of their end.

A node is lost when its connection closes, when it gives no sign of life, or when one of its ranks has gone.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from phloem.core.errors import ConfigError, EngineDead, PhloemError
from phloem.core.nodes import Nodes
from phloem.launch.agree import differences, version_of
from phloem.launch.wire import (
    BEAT,
    FOR_RANKS,
    HELLO_SECONDS,
    LOOK,
    PROTOCOL,
    SILENT_NODE,
    Beat,
    Begin,
    Bye,
    Challenge,
    Echo,
    Hello,
    Lost,
    Refused,
    Stream,
    Welcome,
    Word,
    fresh,
    from_node,
    proof_of,
    proves,
    resolve,
)
from phloem.utils import log
from phloem.utils.ipc import frame
from phloem.utils.sockets import bind

if TYPE_CHECKING:
    from phloem.core.config import Config

_log = log.get("launch")

MOST_STRANGERS = 16  # connections that have not shown yet who they are
LAST_SECONDS = 1.0  # that nodes get to hear the last word
MOST_TOLD = 3  # of those who were turned away, the last ones: anybody may knock for as long as it serves
FAREWELL = 10.0  # that nodes get to come and hear that there is no start
WAIT = 0.1  # seconds between looks for nodes that have not come


class Node:
    """One of them: what it is called, and its stream."""

    def __init__(self, number: int, size: int, stream: Stream) -> None:
        self.number, self.stream = number, stream
        self.name = f"node {number} of {size} ({stream.there.rpartition(':')[0]})"
        self.over = threading.Event()  # nothing comes from it any more


class FurtherNodes:
    """Nodes 1 and up. It listens from the beginning to the end: whoever comes late is told why it is not let in.

    Args:
        facts: of this node (`launch.agree`).
        heard: called with what a node says of its ranks, in a thread of that node.
        lost: called once with the reason for which a node has gone, in that thread.

    Raises:
        ConfigError: the address is taken, or not of this machine.
    """

    def __init__(
        self,
        config: Config,
        nodes: Nodes,
        facts: dict[str, str],
        heard: Callable[[Node, Word | Echo], None],
        lost: Callable[[str], None],
    ) -> None:
        self._nodes, self._facts, self._heard, self._lost = nodes, facts, heard, lost
        self._secret, self._timeout = config.nodes.dist_secret or "", config.nodes.dist_timeout
        # Those that Ray has started do not come again: another start has others.
        self._again = config.server.on_engine_death == "restart" and not config.nodes.use_ray
        self._patience = config.schedule.watchdog_timeout
        self._all: dict[int, Node] = {}
        self._strangers: set[Stream] = set()
        self._lock, self._closing, self._begun = threading.Lock(), threading.Event(), False
        self._ending = False  # whoever comes now belongs to the next start
        self._problem = ""  # why no start is possible
        self._told: set[int] = set()  # nodes that have heard it
        self._turned_away: deque[str] = deque(maxlen=MOST_TOLD)  # who was refused, or has gone again, and why
        resolve(nodes.host, nodes.port)
        self._listening = bind(nodes.host, nodes.port, "dist_init_addr")
        self._listening.listen(64)
        self._threads = [threading.Thread(target=self._accept, name="phloem-nodes", daemon=True)]
        self._threads[0].start()

    def wait(self) -> None:
        """Until all have come.

        Raises:
            ConfigError: one has something else than this node, two are the same, or one does not come in time.
        """
        until = monotonic() + self._timeout
        while True:
            with self._lock:
                lacks = [number for number in range(1, self._nodes.size) if number not in self._all]
                if not (lacks or self._problem):
                    return
            if not self._problem and monotonic() > until:
                which = f"node{'s' if len(lacks) > 1 else ''} {', '.join(map(str, lacks))} of {self._nodes.size}"
                has = "have" if len(lacks) > 1 else "has"
                more = "".join(f"; {one}" for one in self._turned_away)
                self._problem = f"{which} {has} not come to {self._nodes.host}:{self._nodes.port} within "
                self._problem += f"{self._timeout:g} s (dist_timeout){more}"
            if self._problem:
                raise ConfigError(self._problem)
            self._closing.wait(WAIT)

    def fail(self, why: str) -> None:
        """Nobody needs to be waited for: no start is possible."""
        with self._lock:
            self._problem = self._problem or why

    def dismiss(self, why: str, seconds: float) -> None:
        """No start is possible, and all nodes are to know: wait for them, so long at most."""
        self.fail(why)
        until = monotonic() + seconds
        while monotonic() < until and not self._closing.wait(WAIT):
            with self._lock:
                if len(self._told) >= self._nodes.size - 1:
                    return

    @property
    def all(self) -> list[Node]:
        """Those that have come, in their order."""
        with self._lock:
            return [node for _, node in sorted(self._all.items())]

    def begin(self, comm: str, port: int) -> None:
        """Let all start their ranks. Raises EngineDead when one has gone."""
        self._begun = True
        for node in self._all.values():
            self._send(node, Begin(comm, port))
        beats = threading.Thread(target=self._beat, name="phloem-beats", daemon=True)
        beats.start()
        self._threads.append(beats)

    def tell(self, data: bytes) -> None:
        """To all ranks of all nodes, as it is. Raises EngineDead when a node has gone."""
        framed = frame(FOR_RANKS + data)
        for node in self._all.values():
            try:
                node.stream.send_raw(framed)
            except OSError as error:
                raise EngineDead(f"{node.name} takes no message: {error}") from None

    def end(self) -> None:
        """Let nobody in any more."""
        self._ending = True

    def close(self, why: str, served: bool) -> None:
        """Say goodbye. `why`: "" when the work is done; what has ended a start ends further nodes, and what has ended
        an engine that `served` lets them come again, where engines are started again."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            nodes, strangers = list(self._all.values()), list(self._strangers)
        last = Bye(why, self._again and served) if self._begun else Refused(why or "node 0 ended its start")
        for node in nodes:
            with contextlib.suppress(OSError):  # it has gone
                node.stream.trust(LAST_SECONDS)
                node.stream.finish(last)
        # What it still says would, once this end is closed, destroy what it has not read yet.
        until = monotonic() + LAST_SECONDS
        for node in nodes:
            node.over.wait(max(0.0, until - monotonic()))
            node.stream.close()
        for stream in strangers:
            stream.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2.0)

    # --- those who come

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):  # it has gone again
                stream = Stream(sock)
                with self._lock:
                    full = len(self._strangers) >= MOST_STRANGERS or self._closing.is_set()
                    if not full:
                        self._strangers.add(stream)
                if full:
                    stream.close()
                    continue
                threading.Thread(target=self._meet, args=(stream,), name="phloem-node", daemon=True).start()

    def _meet(self, stream: Stream) -> None:
        """In a thread of its own: find out who it is, and then listen to it until it ends."""
        try:
            node = self._greet(stream)
        except (Lost, OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            has = "has one" if self._secret else "has none"
            why = f"was no node of this version, or one that differs in dist_secret, of which node 0 {has}"
            self._note(f"what came from {stream.there} {why} ({error})")
            node = None
        finally:
            with self._lock:
                self._strangers.discard(stream)
        if node is None:
            stream.close()
            return
        self._listen(node)

    def _greet(self, stream: Stream) -> Node | None:
        nonce = fresh()
        stream.send(Challenge(PROTOCOL, self._facts["version of phloem"], nonce, bool(self._secret)))
        until = monotonic() + HELLO_SECONDS
        while (data := stream.read(LOOK)) is None:
            if monotonic() > until or self._closing.is_set():
                raise Lost("it says nothing")
        hello = from_node(data)
        if not isinstance(hello, Hello):
            raise Lost("it does not say who it is")
        if self._secret and not proves(hello.proof, self._secret, "node", nonce, hello.nonce):
            return self._refuse(stream, "its secret (dist_secret) is not that of node 0")
        if self._ending:
            return None
        node = Node(hello.node, self._nodes.size, stream)
        if hello.problem and self._begun:
            return self._refuse(stream, f"{hello.problem}; all nodes are there")
        problem = f"{node.name} does not start: {hello.problem}" if hello.problem else ""
        problem = problem or differences(self._facts, hello.facts, node.name)
        if not problem and not 0 < hello.node < self._nodes.size:
            problem = f"{node.name}: nodes beside this one are 1 to {self._nodes.size - 1} (node_rank)"
        with self._lock:
            other = self._all.get(hello.node)
            if other is not None:
                twice = f"node_rank {hello.node} is given twice: to {other.stream.there} and to {stream.there}"
                problem = problem or twice
                if self._begun:
                    return self._refuse(stream, f"{problem}; all nodes are there")
            if problem:
                self._problem = self._problem or problem
            if self._problem:
                self._refuse(stream, self._problem)
                self._told.add(hello.node)
                return None
            stream.send(Welcome(proof_of(self._secret, "lead", hello.nonce, nonce)))
            stream.trust(self._patience)
            self._all[hello.node] = node
        _log.info("%s has come from %s", node.name, stream.there)
        return node

    def _refuse(self, stream: Stream, why: str) -> None:
        self._note(f"{stream.there} was refused: {why}")
        stream.send(Refused(why))

    def _note(self, what: str) -> None:
        _log.warning("%s", what)
        self._turned_away.append(what)

    # --- those who are there

    def _listen(self, node: Node) -> None:
        try:
            why = self._hear(node)
        except Exception as error:  # who is not listened to is not waited for
            why = f"what it says is not understood ({type(error).__name__}: {error})"
        node.over.set()
        if self._closing.is_set():
            return
        if not self._begun:  # another one may come in its place
            with self._lock:
                if self._all.get(node.number) is node:
                    del self._all[node.number]
            self._note(f"{node.name} has gone again: {why}")
        else:
            self._ending = True
            self._lost(f"{node.name} has gone: {why}")
        node.stream.close()

    def _hear(self, node: Node) -> str:
        """Until its end, whose reason it gives."""
        silent = 0
        while silent < SILENT_NODE:
            try:
                data = node.stream.read(LOOK)
                silent = silent + 1 if data is None and self._begun else 0
                said = None if data is None else from_node(data)
            except (Lost, msgspec.DecodeError) as error:
                return str(error)
            if isinstance(said, Word | Echo):
                self._heard(node, said)
        return f"no sign of life for {SILENT_NODE * LOOK:g} s"

    def _beat(self) -> None:
        while not self._closing.wait(BEAT):
            for node in self._all.values():
                with contextlib.suppress(OSError):  # its listener finds the same
                    node.stream.send(Beat())

    def _send(self, node: Node, message: Begin) -> None:
        try:
            node.stream.send(message)
        except OSError as error:
            raise EngineDead(f"{node.name} has gone: {error}") from None


def dismiss(config: Config, why: str) -> None:
    """Of node 0, which cannot start: the other nodes are told the reason, those that come soon."""
    if config.nodes.nnodes == 1 or config.nodes.use_ray:  # Ray starts the others later
        return
    seconds = min(FAREWELL, config.nodes.dist_timeout)
    _log.error("%s; the other nodes are told, if they come within %g s", why, seconds)
    try:
        facts = {"version of phloem": version_of("phloem")}
        further = FurtherNodes(config, Nodes.of(config), facts, lambda *_: None, lambda _: None)
    except PhloemError as error:
        _log.warning("the other nodes are not told: %s", error.message)
        return
    further.dismiss(why, seconds)
    further.close(why, False)


def listening_beside(host: str) -> tuple[socket.socket, int]:
    """A socket that listens at any free port of this address, and that port."""
    found = bind(host, 0, "dist_init_addr")
    found.listen(256)
    return found, found.getsockname()[1]
