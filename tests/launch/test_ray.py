"""Nodes of one model that Ray places: two of them on this machine, by Ray's own cluster for tests."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from served import Server, check_folders_gone, eventually, gone, ranks_of, shared_folders
from share_support import checkpoint
from test_nodes import struck

from phloem import Engine
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.core.nodes import Nodes
from phloem.launch.ray_driver import Driver, Refusal
from phloem.launch.ray_node import as_urgent_as

SMALL: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 2048, "threads": 1}
there = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("ray") is None,
    reason="needs Linux and Ray: pip install 'phloem[ray]'",
)


def test_without_ray_the_start_ends_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phloem.launch.ray_nodes.installed", lambda: False)
    path = checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"use_ray: Ray is not installed: pip install 'phloem\[ray\]'"):
        Engine(model_path=str(path), tp_size=2, nnodes=2, use_ray=True, log_level="warning", **SMALL)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, "use_ray: one rank needs no other machine"),
        ({"tp": 2, "dp": 2}, "use_ray: dp_size 2"),
    ],
)
def test_what_ray_has_nothing_to_place_for_is_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Config.from_flat({"use_ray": True, **values})


def test_nodes_need_no_address_where_ray_knows_it() -> None:
    config = Config.from_flat({"use_ray": True, "tp": 4, "nnodes": 2})
    assert Nodes.of(config) == Nodes(2, 0, 2)
    with pytest.raises(ConfigError, match="node_rank is for those that are started by hand"):
        Nodes.of(config.with_(node_rank=1))
    with pytest.raises(ConfigError, match="dist_init_addr, HOST:PORT of node 0, is needed"):
        Nodes.of(config.with_(use_ray=False))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of Ray, with two processors each, for all cases: each gives back what it took. Whoever asks for a
    cluster meanwhile finds this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else Ray's workers come up behind all other work of the machine
        found = started()
        try:
            patch.setenv("RAY_ADDRESS", found.address)
            yield found
        finally:
            found.shutdown()


def started(attempts: int = 4) -> Any:
    """Ray gives each of its nodes half a minute, which beside other work may be too little."""
    node, found = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}, None
    for attempt in range(attempts):
        try:
            found = importlib.import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args=node)
            found.add_node(num_cpus=2, object_store_memory=80 << 20)
            return found
        except Exception:
            if found is not None:
                found.shutdown()
            if attempt == attempts - 1:
                raise
    return None


def processes(module: str) -> list[psutil.Process]:
    """Those of this test, and of what it has started, that run a module."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if module in child.cmdline():
                found.append(child)
    return found


NODE, DRIVER, RANK = "phloem.launch.ray_node", "phloem.launch.ray_driver", "phloem.launch.rank"


@pytest.mark.slow
@there
@pytest.mark.parametrize(
    ("module", "told"),
    [(RANK, "rank 1 of 2"), (NODE, "node 1 of 2"), (DRIVER, "use_ray")],
    ids=["rank", "node", "driver"],
)
def test_ray_places_starts_and_starts_again(module: str, told: str, tmp_path: Path, cluster: Any) -> None:
    """One bundle on each node; a rank, a node's process or the one that speaks to Ray dies under load: what runs is
    answered 503, all start again, and give the same tokens. In the end nothing of it is left."""
    path, before = checkpoint("llama", tmp_path), shared_folders()
    with Engine(model_path=str(path), log_level="warning", **SMALL) as one:
        ask = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
        expected = one.generate("hello world", ask)["output_ids"]
    arguments = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    server = Server(path, *arguments, "--tp", "2", "--nnodes", "2", "--use-ray", "--max-engine-restarts", "9")
    try:
        server.wait_ready()
        assert any("2 nodes (nnodes), placed by Ray" in line for line in server.lines)
        raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
        (node,) = processes(NODE)
        (raylet,) = {parent.pid for parent in node.parents()} & set(raylets)
        assert raylet == next(iter(cluster.worker_nodes)).all_processes["raylet"][0].process.pid, (
            "node 0 is where this runs"
        )
        assert server.generate("hello world", 24).json()["output_ids"] == expected
        first = running(server)
        answer = struck(server, first[module], signal.SIGKILL)
        assert told in answer and '"retryable":true' in answer.replace(" ", ""), answer
        eventually(lambda: all(gone(pid) for pid in first.values()), 30)
        eventually(lambda: server.get("/health").status_code == 200, 240)
        assert server.generate("hello world", 24).json()["output_ids"] == expected
        last = running(server)
        assert len(last) == 4 and not set(last.values()) & set(first.values()), "all of them have been started again"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        eventually(lambda: all(gone(pid) for pid in last.values()), 30)
    finally:
        server.close()
    check_folders_gone(before)
    eventually(lambda: free_processors() == 4, 30)


def running(server: Server) -> dict[str, int]:
    """The processes of one start, by what they run."""
    (node,), (driver,) = processes(NODE), processes(DRIVER)
    (rank,) = ranks_of(node.pid)
    return {RANK: rank, NODE: node.pid, DRIVER: driver.pid, "engine": server.engine_pid()}


def free_processors() -> float:
    """Of the whole cluster: what a placement group holds is not among them."""
    ray: Any = importlib.import_module("ray")
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    try:
        return ray.available_resources().get("CPU", 0)
    finally:
        ray.shutdown()


@pytest.mark.parametrize(("here", "others", "set_to"), [(15, 0, 0), (15, 5, 5), (0, 0, None), (0, 5, None)])
def test_a_node_is_as_urgent_as_node_0(
    here: int, others: int, set_to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts its workers behind all other work, and every step waits for its slowest rank."""
    asked: list[int] = []
    monkeypatch.setattr(os, "getpriority", lambda which, who: here)
    monkeypatch.setattr(os, "setpriority", lambda which, who, value: asked.append(value))
    as_urgent_as(others)
    assert asked == ([] if set_to is None else [set_to])


def test_a_node_that_may_not_be_as_urgent_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(which: int, who: int, value: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "getpriority", lambda which, who: 15)
    monkeypatch.setattr(os, "setpriority", refuse)
    as_urgent_as(0)
    said = capsys.readouterr().out
    assert "niceness 15, node 0 has 0: Permission denied" in said and "RAY_worker_niceness=0" in said


@pytest.mark.slow
@there
def test_what_ray_has_no_room_for_is_told_and_one_node_reserves_its_own(tmp_path: Path, cluster: Any) -> None:
    path = str(checkpoint("llama", tmp_path))
    small = {"model_path": path, "use_ray": True, "log_level": "warning", **SMALL}
    with pytest.raises(ConfigError, match=r"found no room for 4 nodes with 1 free CPUs each.*within 2 s.*\(here\): 2"):
        Engine(tp_size=4, nnodes=4, dist_timeout=2, **small)
    with Engine(tp_size=2, **small) as engine:  # on this machine alone: Ray knows that its processors are taken
        assert len(engine.generate("hello", {"max_new_tokens": 4, "ignore_eos": True})["output_ids"]) == 4
        assert free_processors() == 2
    eventually(lambda: free_processors() == 4, 20)
    assert not processes(DRIVER)


def test_no_cluster_is_told() -> None:
    def init(**options: Any) -> None:
        assert options["address"] == "auto", "it starts none"
        raise ConnectionError("nothing runs\nhere")

    order = {"nodes": 2, "each": 1, "seconds": 1.0, "config": {}, "port": 1, "given": None}
    driver = Driver(SimpleNamespace(init=init), order, threading.Event())
    with pytest.raises(Refusal, match=r"no cluster of Ray was found: `ray start` .* \(nothing runs here\)"):
        driver.connect()
