"""What `phloem doctor --nodes` finds out: whether nodes find each other and agree, their clocks, and their links."""

from __future__ import annotations

import contextlib
import queue
import statistics
import threading
from dataclasses import dataclass
from time import monotonic, perf_counter, time
from typing import TYPE_CHECKING

from phloem.checkpoint.describe import described
from phloem.core.errors import ConfigError, EngineDead
from phloem.core.nodes import Nodes
from phloem.launch.agree import facts_of
from phloem.launch.node import heard, joined
from phloem.launch.nodes import FurtherNodes, Node
from phloem.launch.wire import LOOK, Beat, Bye, Echo, Ping, Word
from phloem.utils.queues import within

if TYPE_CHECKING:
    from phloem.core.config import Config

PINGS, LOADS, LOAD = 64, 4, 4 << 20  # small ones, large ones, and the bytes of a large one
SECONDS = 30.0  # that an answer may take
APART = 1.0  # seconds between two clocks that are worth a word


@dataclass(frozen=True)
class Link:
    """From node 0 to another one and back. Seconds, and bytes a second each way; `ahead`: of the other one's clock,
    known to half of `best`."""

    name: str
    best: float
    median: float
    rate: float
    ahead: float

    def __str__(self) -> str:
        clock = f"its clock is {abs(self.ahead) * 1e3:.2f} ms {'ahead' if self.ahead >= 0 else 'behind'}"
        clock += f": more than {APART:g} s, so that logs do not fit together" if abs(self.ahead) > APART else ""
        took = f"{self.best * 1e6:.0f} us there and back, {self.median * 1e6:.0f} in the middle"
        return f"same versions, settings and checkpoint; {took}; {self.rate / 2**20:.0f} MiB/s by one stream; {clock}"


def look(config: Config) -> list[tuple[str, str]]:
    """What each node is told of itself or, on node 0, of the others: (name, text).

    Raises:
        ConfigError: nodes differ, or one does not come in time.
        EngineDead: one has gone meanwhile.
    """
    if config.nodes.use_ray:
        raise ConfigError("use_ray: nodes that Ray chooses are compared when they start", param="use_ray")
    nodes = Nodes.of(config)
    facts = facts_of(config, described(config.model), "doctor --nodes")
    own = f"phloem {facts['version of phloem']}, torch {facts['version of torch']}"
    own += f", digest of the weights {facts['digest of the weights']}"
    found = [(f"node {nodes.rank}", own)]
    if nodes.rank:
        return [*found, ("node 0", _answer(config, nodes, facts))]
    return [*found, *((link.name, str(link)) for link in _links(config, nodes, facts))]


def _links(config: Config, nodes: Nodes, facts: dict[str, str]) -> list[Link]:
    echoes: queue.SimpleQueue[Echo] = queue.SimpleQueue()

    def hear(_: Node, said: Word | Echo) -> None:
        if isinstance(said, Echo):
            echoes.put(said)

    why = "a node has ended its look"
    further = FurtherNodes(config, nodes, facts, hear, lambda _: None)
    try:
        further.wait()
        found = [_measured(node, echoes) for node in further.all]
        for node in further.all:
            with contextlib.suppress(OSError):  # it has read it, and gone
                node.stream.finish(Bye("", again=False))
        return found
    except OSError as error:
        raise EngineDead(f"{why}: {error}") from None
    except BaseException as error:
        why = str(error)
        raise
    finally:
        further.close(why, served=False)


def _measured(node: Node, echoes: queue.SimpleQueue[Echo]) -> Link:
    def once(number: int, data: bytes) -> tuple[float, float]:
        begun, clock = perf_counter(), time()
        node.stream.send(Ping(number, data))
        while (echo := _next(node, echoes)).number != number:
            pass
        took = perf_counter() - begun
        return took, echo.clock - (clock + took / 2)

    small = [once(number, b"") for number in range(PINGS)]
    load = bytes(LOAD)
    large = min(once(PINGS + number, load)[0] for number in range(LOADS))
    best, ahead = min(small)
    return Link(node.name, best, statistics.median(took for took, _ in small), 2 * LOAD / large, ahead)


def _next(node: Node, echoes: queue.SimpleQueue[Echo]) -> Echo:
    """Raises EngineDead when the node has gone, or does not answer."""
    until = monotonic() + SECONDS
    while monotonic() < until:
        gone = node.over.is_set()  # read before the queue, in which its last answer may lie
        with contextlib.suppress(queue.Empty):
            return within(echoes, 0 if gone else LOOK)
        if gone:
            raise EngineDead(f"{node.name} has gone")
    raise EngineDead(f"{node.name} does not answer within {SECONDS:g} s")


def _answer(config: Config, nodes: Nodes, facts: dict[str, str]) -> str:
    stop = threading.Event()
    stream = joined(config, nodes, facts, stop)
    until = monotonic() + config.nodes.dist_timeout
    try:
        while monotonic() < until:
            told = heard(stream, config.nodes.dist_timeout, stop)
            if isinstance(told, Ping):
                stream.send(Echo(told.number, time(), told.data))
            elif isinstance(told, Bye):
                return "same versions, settings and checkpoint; it says how long the way is"
            elif not isinstance(told, Beat):
                break
    except OSError as error:
        raise EngineDead(f"node 0 has gone: {error}") from None
    finally:
        stream.close()
    raise EngineDead("node 0 has ended its look")
