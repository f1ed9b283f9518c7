"""The process that speaks to Ray for one start of an engine: `python -m phloem.launch.ray_driver`, its order on
standard input. It reserves a bundle of processors on each node, starts the further nodes, and tells when one has ended.

It is apart from the engine, so that no thread of Ray's runs beside a step. What it holds of Ray goes with it: actors
and the placement group are of this driver's job.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
from time import monotonic
from typing import Any

import msgspec

from phloem.core.nodes import address_text
from phloem.launch.child import Said
from phloem.launch.ray_node import RayNode
from phloem.utils.ipc import frame
from phloem.utils.processes import die_with_parent

LOOK = 0.25  # seconds between two looks at what was asked of Ray
NODE_LABEL = "ray.io/node-id"  # Ray gives it to each of its nodes


class Refusal(Exception):
    """What is wrong, for people."""


class Driver:
    """One start: `nodes` machines, on each of which `each` ranks run. The first of them is this one."""

    def __init__(self, ray: Any, order: dict[str, Any], over: threading.Event) -> None:
        self._ray, self._over = ray, over
        self._nodes, self._each, self._seconds = order["nodes"], order["each"], order["seconds"]
        self._flat: dict[str, Any] = order["config"]
        self._port, self._given = order["port"], order["given"]
        self._group: Any = None
        self._actors: list[Any] = []
        self._watching: dict[Any, int] = {}

    def connect(self) -> None:
        """Raises Refusal where no cluster is there, or it is of another version."""
        try:
            self._ray.init(address="auto", namespace="phloem", logging_level="warning", log_to_driver=True)
        except ConnectionError as error:
            why = f"no cluster of Ray was found: `ray start` on this machine first, or set RAY_ADDRESS ({error})"
            raise Refusal(why.replace("\n", " ")) from None

    def place(self) -> str:
        """Wait for room; gives the address at which others reach this node. Raises Refusal where none is in time."""
        ray, util = self._ray, importlib.import_module("ray.util")
        here = ray.get_runtime_context().get_node_id()
        bundles = [{"CPU": self._each} for _ in range(self._nodes)]
        labels: list[dict[str, str]] = [{NODE_LABEL: here}, *({} for _ in bundles[1:])]
        strategy = "STRICT_SPREAD" if self._nodes > 1 else "PACK"
        self._group = util.placement_group(bundles, strategy=strategy, bundle_label_selector=labels)
        ready, until = self._group.ready(), monotonic() + self._seconds
        while not self._over.is_set():
            if ray.wait([ready], timeout=LOOK)[0]:
                return str(util.get_node_ip_address())
            if monotonic() > until:
                raise Refusal(self._no_room(here))
        return ""

    def _no_room(self, here: str) -> str:
        alive = [one for one in self._ray.nodes() if one["Alive"]]
        has = [
            f"{one['NodeManagerAddress']}{' (here)' if one['NodeID'] == here else ''}: "
            f"{one['Resources'].get('CPU', 0):g}"
            for one in alive
        ]
        many = "s" if self._nodes > 1 else ""
        wanted = f"{self._nodes} node{many} with {self._each} free CPUs each, one of them here"
        found = f"Ray found no room for {wanted}, within {self._seconds:g} s (dist_timeout)"
        return f"{found}; CPUs of its nodes, used or not: {', '.join(has)}"

    def start(self, address: str) -> None:
        """The further nodes, each on a machine of its own."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        flat = {**self._flat, "dist_init_addr": self._given or address_text(address, self._port)}
        niceness = os.getpriority(os.PRIO_PROCESS, 0)  # the engine's, as this is its child
        for number in range(1, self._nodes):
            strategy = strategies.PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=number
            )
            # Not started again by itself: all ranks are, with the engine.
            options = {"num_cpus": self._each, "max_restarts": 0, "scheduling_strategy": strategy}
            actor = self._ray.remote(RayNode).options(**options).remote({**flat, "node_rank": number}, niceness)
            self._actors.append(actor)
            self._watching[actor.watch.remote()] = number

    def watch(self) -> None:
        """Until it is over. Raises Refusal when a node has ended before."""
        while not self._over.is_set():
            done = self._ray.wait(list(self._watching), timeout=LOOK)[0] if self._watching else []
            for ref in done:
                number = self._watching.pop(ref)
                try:
                    why = self._ray.get(ref)
                except Exception as error:  # of Ray, or of an actor that could not be made
                    why = " ".join(str(error).split())[:500]
                if why:
                    raise Refusal(f"node {number} of {self._nodes}, which Ray started: {why}")
            if not self._watching:
                self._over.wait(LOOK)

    def close(self) -> None:
        """Give back what was taken."""
        with contextlib.suppress(Exception):  # the cluster may have gone
            for actor in self._actors:
                self._ray.kill(actor)
            if self._group is not None:
                importlib.import_module("ray.util").remove_placement_group(self._group)
            self._ray.shutdown()


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line:
        return 1
    order: dict[str, Any] = msgspec.json.decode(line)
    die_with_parent(order["parent"])
    pipe, over = socket.socket(fileno=order["pipe"]), threading.Event()
    pipe.set_inheritable(False)
    threading.Thread(target=_until_closed, args=(pipe, over), name="phloem-engine-watch", daemon=True).start()

    def say(what: str, why: str) -> None:
        with contextlib.suppress(OSError):  # the engine has gone first
            pipe.sendall(frame(msgspec.msgpack.encode(Said(what, why))))

    driver = None
    try:
        driver = Driver(importlib.import_module("ray"), order, over)
        driver.connect()
        address = driver.place()
        if not over.is_set():
            driver.start(address)
            say("placed", address)
            driver.watch()
    except Exception as error:
        say("failed", str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}")
        return 1
    finally:
        if driver is not None:
            driver.close()
    return 0


def _until_closed(pipe: socket.socket, over: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while pipe.recv(4096):
            pass
    over.set()


if __name__ == "__main__":
    sys.exit(main())
