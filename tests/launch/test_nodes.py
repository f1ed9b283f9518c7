"""One model over several nodes, each a command line of its own on this machine."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from loads import answers, load
from nodes_support import FurtherNode, free_port, options
from served import Server, check_folders_gone, eventually, gone, ranks_of, shared_folders
from share_support import checkpoint

from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.launch.core import EngineCore
from phloem.testing.checkpoints import tiny_checkpoint

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")
LOADED: dict[str, Any] = {
    "dtype": "float32", "ops": "reference", "max_total_tokens": 160, "page_size": 8, "context_length": 128,
    "chunked_prefill_size": 16, "max_running_requests": 4, "random_seed": 1, "threads": 1,
}  # fmt: skip
SMALL: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 2048, "threads": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("llama", {"tp_size": 2}), ("qwen3_next", {"pp_size": 2}), ("qwen3_moe", {"pp_size": 2, "tp_size": 2})],
    ids=["tp2", "pp2", "pp2-tp2"],
)
def test_two_nodes_answer_as_one_rank_does(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """With prefix hits, chunks, preemption, grammars, penalties and log probabilities."""
    path = str(checkpoint(name, tmp_path))
    port = free_port()
    # The secret comes by the environment, as it should.
    other = FurtherNode(path, *options(port, **LOADED, **sizes, dist_secret="s3cret"))
    try:
        one = EngineCore(Config.from_flat({"model_path": path, **LOADED}), describe(path), lambda message: None)
        try:
            expected = answers(one, load())
        finally:
            one.close()
        config = Config.from_flat(
            {"model_path": path, **LOADED, **sizes, "debug_invariants": True, "nnodes": 2, "dist_secret": "s3cret",
             "dist_init_addr": f"127.0.0.1:{port}"}
        )  # fmt: skip
        core = EngineCore(config, describe(path), lambda message: None)
        try:
            children = ranks_of(os.getpid())
            assert len(children) == sizes.get("tp_size", 1) * sizes.get("pp_size", 1) // 2 - 1
            found = answers(core, load())
        finally:
            core.close()
        assert other.wait() == 0, other.lines
        assert all(gone(pid) for pid in children)
    finally:
        other.close()
    for key, (tokens, values, _) in expected.items():
        assert found[key][0] == tokens and len(tokens) > 3, key
        assert found[key][1] == pytest.approx(values, abs=1e-4), key
    decisions = {name: why for name, _, why in core.info["decisions"]}
    assert "2 nodes" in decisions["tp_size"] and "gloo" in decisions["tp_size"]


@pytest.mark.slow
@linux
def test_a_node_that_dies_or_stops_is_found_and_all_start_again(tmp_path: Path) -> None:
    """Its own process or its rank's, under load: all that ran is answered, and nothing of it stays."""
    path = checkpoint("llama", tmp_path)
    arguments, before = options(free_port(), **SMALL, tp=2, max_engine_restarts=9), shared_folders()
    server, other, pids = Server(path, *arguments), FurtherNode(path, *arguments), list[int]()
    try:
        server.wait_ready()
        expected = server.generate("hello world", 24).json()["output_ids"]
        for which, number in (
            ("rank", signal.SIGSTOP),
            ("node", signal.SIGSTOP),
            ("node", signal.SIGKILL),
        ):
            (rank,) = ranks_of(other.process.pid)
            engine, joined = server.engine_pid(), other.joined
            answer = struck(server, rank if which == "rank" else other.process.pid, number)
            assert "node 1 of 2" in answer, answer
            assert ("rank 1 of 2" in answer) == (which == "rank"), answer
            if (which, number) == ("node", signal.SIGSTOP):
                other.process.send_signal(signal.SIGCONT)
            elif which == "node":
                eventually(lambda rank=rank: gone(rank), 5)
                other.close()
                other = FurtherNode(path, *arguments)
                joined = 0
            eventually(lambda: server.get("/health").status_code == 200, 90)
            assert server.generate("hello world", 24).json()["output_ids"] == expected
            assert gone(rank) and gone(engine) and other.joined == joined + 1
        pids = [server.engine_pid(), *ranks_of(other.process.pid)]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert other.wait() == 0, other.lines
        assert len(set(pids)) == 2 and all(gone(pid) for pid in pids)
    finally:
        server.close()
        other.close()
    check_folders_gone(before)  # also of one that was killed


def struck(server: Server, pid: int, number: signal.Signals) -> str:
    """Send a process a signal while requests run; they are answered 503, with the text that is given."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    askers = [threading.Thread(target=lambda: answers.put(server.generate("a story", 450))) for _ in range(3)]
    for asker in askers:
        asker.start()
    eventually(lambda: server.state()["running"] == 3)
    os.kill(pid, number)
    found = [answers.get(timeout=10) for _ in askers]
    assert all(answer.status_code == 503 and answer.headers["retry-after"] for answer in found), found[0].text
    return found[0].text


@pytest.mark.slow
@linux
def test_a_server_that_waits_for_its_nodes_ends_by_a_signal_and_leaves_nothing(tmp_path: Path) -> None:
    path, port, before = checkpoint("llama", tmp_path), free_port(), shared_folders()
    server = Server(path, *options(port, **SMALL, tp=4, pp_size=1))
    try:
        eventually(lambda: listens(port), 90)
        pids = [server.engine_pid(), *ranks_of(server.engine_pid())]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 130
        eventually(lambda: all(gone(pid) for pid in pids), 30)  # a rank may be at its imports
    finally:
        server.close()
    check_folders_gone(before)


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@linux
def test_another_checkpoint_or_a_missing_node_ends_the_start_on_every_node(tmp_path: Path) -> None:
    path, second = checkpoint("llama", tmp_path / "a"), checkpoint("qwen3", tmp_path / "b")
    arguments = options(free_port(), **SMALL, tp=2, dist_timeout=60)
    before = set(psutil.Process().children(recursive=True))  # of tests in this process before
    server, other = Server(path, *arguments), FurtherNode(second, *arguments)
    alone, early = Server(path, *options(free_port(), tp=2, dist_timeout=0.5)), FurtherNode(
        path, *options(free_port(), tp=2, dist_timeout=0.5)
    )  # fmt: skip
    try:
        for process in (server.process, other.process, alone.process, early.process):
            assert process.wait(60) == 1
        for node in (server, other):
            eventually(lambda node=node: "model type is qwen3 there, llama here" in "\n".join(node.lines), 5)
        eventually(lambda: "node 1 of 2 has not come" in "\n".join(alone.lines), 5)
        eventually(lambda: "node 0 at 127.0.0.1" in "\n".join(early.lines), 5)
        assert any("0.5 s (dist_timeout): Connection refused" in line for line in early.lines)
        assert not set(psutil.Process().children(recursive=True)) - before
    finally:
        for started in (server, other, alone, early):
            started.close()


@pytest.mark.slow
@linux
def test_sizes_that_cannot_be_shared_out_are_told_to_every_node(tmp_path: Path) -> None:
    """Node 0 alone finds it, before it would listen to anybody."""
    path = tiny_checkpoint("llama", tmp_path, num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    arguments = options(free_port(), **SMALL, tp=2, dist_timeout=60)
    server, other = Server(path, *arguments), FurtherNode(path, *arguments)
    try:
        why = "tp_size 2: 9 attention heads and 3 kv heads cannot be shared out; valid: 1, 3, 9"
        for node in (server, other):
            assert node.process.wait(90) == 1
            eventually(lambda node=node: why in "\n".join(node.lines), 5)
    finally:
        server.close()
        other.close()
