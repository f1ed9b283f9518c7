"""A further node of a model (`--node-rank` 1 and up): it joins node 0, starts the ranks that lie here, and passes on
what they are told. It answers no HTTP and imports no torch.

Whatever ends it or one of its ranks ends the whole engine; it then joins the next start, or ends, as
`--on-engine-death` says.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.checkpoint.describe import described
from phloem.core.config import log_format
from phloem.core.errors import ConfigError, PhloemError
from phloem.core.nodes import Nodes, address_of
from phloem.engine.choices.unserved import refuse_unserved
from phloem.engine.ranks.unshared import refuse_unshared
from phloem.launch.agree import facts_of, version_of
from phloem.launch.child import LEAVE_SECONDS, Child, Said, end, meeting_place, watch
from phloem.launch.wire import (
    BEAT,
    FOR_RANKS,
    HELLO_SECONDS,
    LOOK,
    PROTOCOL,
    SILENT_LEAD,
    Beat,
    Begin,
    Bye,
    Challenge,
    FromLead,
    Hello,
    Lost,
    Refused,
    Stream,
    Welcome,
    Word,
    fresh,
    from_lead,
    proof_of,
    proves,
    resolve,
)
from phloem.utils import log, machine
from phloem.utils.ipc import frame
from phloem.utils.say import say

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.core.config import Config

_log = log.get("launch")

AGAIN = 0.2  # seconds between two tries to reach node 0
RESTART_WINDOW = 600.0  # seconds in which `max_engine_restarts` are counted
FAREWELL = 10.0  # seconds in which node 0 may be reached, to hear that there is no start
SLACK = 10.0  # seconds beyond its time-out that node 0 may take to say what is wrong


class Told(Exception):
    """A signal asks this node to end."""


def run(config: Config) -> int:
    """Until node 0 has done its work, or a signal; returns the process's exit status.

    Raises:
        PhloemError: several ranks do not serve this, node 0 is not there in time, or something here differs from it.
    """
    nodes = Nodes.of(config)
    log.configure(config.server.log_level, f"node {nodes.rank}", log_format())
    machine.allow_open_files()
    try:
        checkpoint = described(config.model)
        refuse_unserved(config, checkpoint, several=True)  # as node 0 does
        refuse_unshared(config, checkpoint)
        facts = facts_of(config, checkpoint)
    except PhloemError as error:
        tell_lead(config, error.message)
        raise
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ended: list[float] = []
    while True:
        member = _Member(config, nodes, stop)
        try:
            bye = member.run(joined(config, nodes, facts, stop))
        except Told:
            return 0
        finally:
            member.close()
        if not bye.again:
            if bye.why:
                _log.error("node 0 ends: %s", bye.why)
            return 1 if bye.why else 0
        _log.error("the engine is gone: %s", bye.why)
        now = monotonic()
        ended = [at for at in ended if now - at < RESTART_WINDOW]
        if len(ended) >= config.server.max_engine_restarts:
            _log.error("the engine died %d times within ten minutes; giving up", len(ended) + 1)
            return 1
        ended.append(now)
        _log.warning("joining node 0 again (%d of %d)", len(ended), config.server.max_engine_restarts)


def joined(config: Config, nodes: Nodes, facts: dict[str, str], stop: threading.Event, problem: str = "") -> Stream:
    """A stream on which `Begin` comes next, or has come: node 0 knows this node, and it node 0. `problem`: why this
    node does not start, which is told to node 0 and ends the start of all."""
    until, why = monotonic() + config.nodes.dist_timeout, "it does not answer"
    resolve(nodes.host, nodes.port)
    while monotonic() < until:
        if stop.is_set():
            raise Told
        try:
            stream = Stream(socket.create_connection((nodes.host, nodes.port), timeout=HELLO_SECONDS))
        except OSError as error:
            why = error.strerror or str(error)
            stop.wait(AGAIN)
            continue
        try:
            _hello(config, nodes, facts, stream, stop, problem)
            stream.trust(config.schedule.watchdog_timeout)
            return stream
        except (OSError, msgspec.DecodeError) as error:  # it may be about to start again
            why = f"{error}"
            stream.close()
            stop.wait(AGAIN)
        except BaseException:
            stream.close()
            raise
    raise ConfigError(
        f"node 0 at {nodes.host}:{nodes.port} was not there for node {nodes.rank} of {nodes.size} within "
        f"{config.nodes.dist_timeout:g} s (dist_timeout): {why}",
        param="dist_init_addr",
    )


def tell_lead(config: Config, why: str, seconds: float = FAREWELL) -> None:
    """Of a node that cannot start: node 0 is told the reason, if it is reached within so many seconds, so that nobody
    waits for this one. Raises nothing: the reason is more than what hinders its telling."""
    own, stop = config.nodes, threading.Event()
    seconds = min(seconds, own.dist_timeout)
    try:
        host, port = address_of(own.dist_init_addr or "")
        nodes = Nodes(own.nnodes, own.node_rank or 0, 1, host, port)
        _log.error("%s; node 0 is told, if it is reached within %g s", why, seconds)
        joined(config.with_(dist_timeout=seconds), nodes, {"version of phloem": version_of("phloem")}, stop, why)
    except (PhloemError, OSError) as error:
        _log.debug("node 0 was told, or not reached: %s", error)


def _hello(
    config: Config, nodes: Nodes, facts: dict[str, str], stream: Stream, stop: threading.Event, problem: str
) -> None:
    """Both show who they are. Raises ConfigError where node 0 is another one, or refuses this node."""
    secret, version = config.nodes.dist_secret or "", facts["version of phloem"]
    where, own = f"node 0 at {stream.there}", fresh()
    challenge = heard(stream, min(HELLO_SECONDS, config.nodes.dist_timeout), stop)
    if not isinstance(challenge, Challenge):
        raise Lost("it does not begin as node 0 does")
    if challenge.protocol != PROTOCOL:
        raise ConfigError(f"{where} has another version of phloem: {challenge.version} there, {version} here")
    if bool(secret) != challenge.secret:
        has, lacks = ("this node", "node 0") if secret else ("node 0", "this node")
        raise ConfigError(f"{where}: dist_secret is set on {has}, and not on {lacks}", param="dist_secret")
    proof = proof_of(secret, "node", challenge.nonce, own) if secret else b""
    stream.send(Hello(PROTOCOL, version, own, proof, nodes.rank, nodes.size, facts, problem))
    answer = heard(stream, config.nodes.dist_timeout + SLACK, stop)
    if isinstance(answer, Refused):
        raise ConfigError(f"{where} refuses this node: {answer.why}")
    if not isinstance(answer, Welcome) or (secret and not proves(answer.proof, secret, "lead", own, challenge.nonce)):
        raise ConfigError(f"{where} does not know the secret (dist_secret)", param="dist_secret")
    _log.info("%s knows this node, %d of %d", where, nodes.rank, nodes.size)


def heard(stream: Stream, seconds: float, stop: threading.Event) -> FromLead:
    """The next message. Raises Lost, and Told."""
    until = monotonic() + seconds
    while monotonic() < until:
        if stop.is_set():
            raise Told
        data = stream.read(LOOK)
        if data is not None:
            return from_lead(data)
    raise Lost(f"it says nothing for {seconds:g} s")


class _Member:
    """This node in one start of the engine. Its ranks' processes import what they need while node 0 is waited for."""

    def __init__(self, config: Config, nodes: Nodes, stop: threading.Event) -> None:
        self._config, self._nodes, self._stop = config, nodes, stop
        self._stream: Stream | None = None
        self._loaded: set[int] = set()
        self._gone: list[Word] = []  # before there was anybody to tell it
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._folder: Path | None = None  # where its ranks meet, until all have
        self._threads: list[threading.Thread] = []
        self._children: list[Child] = []
        self._children += [Child(rank, self._said, self._ended) for rank in nodes.ranks(nodes.rank)]

    def run(self, stream: Stream) -> Bye:
        """Until node 0 says goodbye, or has gone. Raises Told, and ConfigError before ranks were started."""
        again = self._config.server.on_engine_death == "restart"
        self._stream = stream
        try:
            begin = heard(stream, self._config.nodes.dist_timeout + SLACK, self._stop)
            if isinstance(begin, Refused):
                raise ConfigError(f"node 0 at {stream.there} does not start: {begin.why}")
            if not isinstance(begin, Begin):
                raise Lost("it does not begin")
            self._start(begin, stream)
            return self._pass_on(stream)
        except (OSError, msgspec.DecodeError) as error:
            return Bye(f"node 0 at {stream.there} has gone: {error}", again)

    def close(self) -> None:
        """All ranks end, by force where they were not asked."""
        self._over.set()
        end(self._children, 0.0)
        if self._stream is not None:
            self._stream.close()
        for thread in self._threads:
            thread.join(timeout=2.0)
        self._forget_place()

    def _start(self, begin: Begin, stream: Stream) -> None:
        lead, _, _ = stream.there.rpartition(":")
        self._folder = meeting_place()
        order: dict[str, Any] = {
            "config": self._config.flat(),
            "place": str(self._folder),
            "comm": begin.comm,
            "board": [lead, begin.port],
            "here": stream.here,
            "ring": None,  # what this node's ranks are told is passed on by their sockets
        }
        ranks = self._nodes.ranks(self._nodes.rank)
        for child in self._children:
            child.begin(order)
            child.patience(self._config.schedule.watchdog_timeout)
        works = (("phloem-beats", self._beat), ("phloem-ranks", self._watch))
        self._threads += [threading.Thread(target=work, name=name, daemon=True) for name, work in works]
        for thread in self._threads:
            thread.start()
        for word in self._gone:
            self._tell(word)
        told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        say(f"Node {self._nodes.rank} of {self._nodes.size} has joined {stream.there} with {told}")

    def _pass_on(self, stream: Stream) -> Bye:
        silent, mark = 0, len(FOR_RANKS)
        while True:
            if self._stop.is_set():
                raise Told
            data = stream.read(LOOK)
            if data is None:
                silent += 1
                if silent >= SILENT_LEAD:
                    raise Lost(f"no sign of life for {SILENT_LEAD * LOOK:g} s")
                continue
            silent = 0
            if data[:mark] == FOR_RANKS:
                framed = frame(data[mark:])
                for child in self._children:
                    with contextlib.suppress(OSError):  # its end is told by who listens to it
                        child.send(framed)
                continue
            told = from_lead(data)
            if isinstance(told, Bye):
                end(self._children, 0.0 if told.why else LEAVE_SECONDS)
                return told

    # --- what is told of ranks, each in a thread of its own

    def _said(self, child: Child, said: Said) -> None:
        if said.what not in ("here", "loaded", "measured"):
            return
        with self._lock:
            memory = said.memory
            if said.what == "loaded":
                self._loaded.add(child.rank)
                memory = machine.memory() if len(self._loaded) == self._nodes.each else None
        if said.what == "loaded" and memory is not None:
            self._forget_place()  # all have what lay there open
        self._tell(Word(child.rank, said.what, bytes_read=said.bytes_read, memory=memory))

    def _forget_place(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _ended(self, child: Child, why: str) -> None:
        if not self._over.is_set():
            self._gone.append(Word(child.rank, "gone", why))
            self._tell(self._gone[-1])

    def _watch(self) -> None:
        watch(self._children, self._over.is_set, self._ended)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._tell(Beat())

    def _tell(self, word: Word | Beat) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # who reads finds that node 0 has gone
                self._stream.send(word)
