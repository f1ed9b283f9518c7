"""How nodes find out who the others are: by threads, without an engine."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from nodes_support import FurtherNode, free_port, options
from served import eventually

from phloem.checkpoint.describe import describe
from phloem.cli import doctor
from phloem.cli._options import parse
from phloem.core.config import Config
from phloem.core.errors import ConfigError, PhloemError
from phloem.core.nodes import Nodes
from phloem.launch import checkup, node
from phloem.launch.agree import differences, facts_of
from phloem.launch.node import joined
from phloem.launch.nodes import FurtherNodes, Node
from phloem.launch.ranks import RankProcesses
from phloem.launch.wire import Begin, Bye, Echo, Word, from_lead, resolve
from phloem.testing.checkpoints import tiny_checkpoint
from phloem.utils.sockets import bind

FACTS = {"version of phloem": "1.0", "dtype": "float32", "digest of the weights": "ab"}


def config_of(port: int, **settings: Any) -> Config:
    address = f"127.0.0.1:{port}"
    return Config.from_flat({"tp_size": 4, "nnodes": 2, "dist_init_addr": address, "dist_timeout": 20, **settings})


class Lead:
    """Node 0, and what it has heard."""

    def __init__(self, port: int, **settings: Any) -> None:
        self.heard: queue.SimpleQueue[tuple[int, Word]] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()

        def hear(node: Node, word: Word | Echo) -> None:
            assert isinstance(word, Word)
            self.heard.put((node.number, word))

        config = config_of(port, **settings)
        self.nodes = FurtherNodes(config, Nodes.of(config), FACTS, hear, self.lost.put)


@contextmanager
def leading(port: int, **settings: Any) -> Generator[Lead]:
    lead = Lead(port, **settings)
    try:
        yield lead
    finally:
        lead.nodes.close("the test ends", False)


def join(port: int, facts: dict[str, str] | None = None, **settings: Any) -> Any:
    config = config_of(port, **{"node_rank": 1, **settings})
    return joined(config, Nodes.of(config), FACTS if facts is None else facts, threading.Event())


def refusal_of(work: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        work()
    return caught.value.message


def next_frame(stream: Any) -> bytes:
    while (data := stream.read(5)) is None:
        pass
    return data


def test_what_is_told_comes_whole_to_the_other_node_and_back() -> None:
    port = free_port()
    with leading(port, dist_secret="s") as lead:
        stream = join(port, dist_secret="s")
        lead.nodes.wait()
        lead.nodes.begin("shm", 4711)
        assert from_lead(next_frame(stream)) == Begin("shm", 4711)
        large = bytes(range(256)) * 20_000
        teller = threading.Thread(target=lead.nodes.tell, args=(large,))
        teller.start()
        while (data := next_frame(stream))[:1] != b"\x00":
            pass
        teller.join(5)
        assert data[1:] == large
        stream.send(Word(3, "loaded", bytes_read=7, memory=(1, 2)))
        assert lead.heard.get(timeout=5) == (1, Word(3, "loaded", bytes_read=7, memory=(1, 2)))
        ended = threading.Thread(target=lead.nodes.close, args=("over", True))
        ended.start()
        while isinstance(told := from_lead(next_frame(stream)), Begin) or not isinstance(told, Bye):
            pass
        assert told == Bye("over", again=True)
        stream.close()
        ended.join(5)
        assert lead.lost.empty()


@pytest.mark.parametrize(
    ("facts", "settings", "why"),
    [
        ({"version of phloem": "0.9"}, {}, "version of phloem is 0.9 there, 1.0 here"),
        ({"dtype": "bfloat16"}, {}, "dtype is bfloat16 there, float32 here"),
        ({"digest of the weights": "cd"}, {}, "digest of the weights is cd there, ab here"),
        ({"new": "1"}, {}, "new is 1 there, missing here"),
        ({"nnodes": "4"}, {"nnodes": 4, "node_rank": 3}, "node 3 of 2 (127.0.0.1) differs"),
        ({}, {"nnodes": 4, "node_rank": 3}, "nodes beside this one are 1 to 1 (node_rank)"),
    ],
)
def test_what_differs_is_named_on_both_sides(facts: dict[str, str], settings: dict[str, Any], why: str) -> None:
    port = free_port()
    with leading(port) as lead:
        assert why in refusal_of(lambda: join(port, {**FACTS, **facts}, **settings))
        assert why in refusal_of(lead.nodes.wait)


@pytest.mark.slow
def test_a_node_rank_that_is_given_twice_ends_the_start_of_all() -> None:
    port = free_port()
    with leading(port, tp_size=6, nnodes=3) as lead:
        first = join(port, tp_size=6, nnodes=3)
        why = "node_rank 1 is given twice"
        assert why in refusal_of(lambda: join(port, tp_size=6, nnodes=3))
        message = refusal_of(lead.nodes.wait)
        assert why in message
        lead.nodes.close(message, False)
        assert why.encode() in next_frame(first)
        first.close()


def test_where_no_start_is_possible_all_nodes_hear_why() -> None:
    """Node 0 waits for them a while, and no longer than until all know."""
    port = free_port()
    with leading(port, nnodes=4) as lead:
        telling = threading.Thread(target=lead.nodes.dismiss, args=("sizes do not divide", 60))
        telling.start()
        for rank in (3, 1, 2):
            assert telling.is_alive()
            assert "refuses this node: sizes do not divide" in refusal_of(
                lambda rank=rank: join(port, nnodes=4, node_rank=rank)
            )
        telling.join(10)
        assert not telling.is_alive()


def test_a_node_that_cannot_start_says_so_and_nobody_waits_for_it() -> None:
    """However it came to that: node 0 hears of a checkpoint that is not there, and of a node rank that cannot be."""
    for rank, why in ((1, "no such file"), (7, "node_rank 7: there are 2 nodes")):
        port = free_port()
        with leading(port) as lead:
            node.tell_lead(config_of(port, node_rank=rank), why)
            assert refusal_of(lead.nodes.wait) == f"node {rank} of 2 (127.0.0.1) does not start: {why}"
    port = free_port()
    with leading(port) as lead:
        stream = join(port)
        lead.nodes.wait()
        lead.nodes.begin("shm", 1)
        node.tell_lead(config_of(port, node_rank=1), "it comes too late")
        lead.nodes.wait()
        lead.nodes.tell(b"still")
        assert lead.lost.empty()
        stream.close()


def test_a_node_that_cannot_start_waits_for_no_node_0() -> None:
    """Nor for another program at its port."""
    begun = time.monotonic()
    node.tell_lead(config_of(free_port(), node_rank=1), "no such file", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as other:
        node.tell_lead(config_of(other.getsockname()[1], node_rank=1), "no such file", 0.3)
    node.tell_lead(config_of(1, node_rank=1, dist_init_addr=None), "no such file")
    assert time.monotonic() - begun < 8


def test_a_second_node_0_is_told_to_the_first(tmp_path: Path) -> None:
    path, port = str(tiny_checkpoint("llama", tmp_path)), free_port()
    with leading(port) as lead:
        with pytest.raises(ConfigError, match="is in use; node_rank says, or leaves out, that this is node 0"):
            RankProcesses(config_of(port, model_path=path, tp_size=2))
        assert "node 0 of 2 (127.0.0.1) does not start" in refusal_of(lead.nodes.wait)


def test_nobody_waits_for_nodes_that_do_not_come_to_hear_it() -> None:
    with leading(free_port()) as lead:
        lead.nodes.dismiss("sizes do not divide", 0.2)
        assert "sizes do not divide" in refusal_of(lead.nodes.wait)


def test_who_comes_late_is_refused_and_changes_nothing() -> None:
    port = free_port()
    with leading(port) as lead:
        first = join(port)
        lead.nodes.wait()
        lead.nodes.begin("shm", 1)
        assert "all nodes are there" in refusal_of(lambda: join(port))
        lead.nodes.wait()
        lead.nodes.tell(b"still")
        assert lead.lost.empty()
        first.close()
        assert "node 1 of 2 (127.0.0.1) has gone" in lead.lost.get(timeout=5)


@pytest.mark.slow
def test_the_secret_is_asked_of_both_sides() -> None:
    port = free_port()
    with leading(port, dist_secret="right", dist_timeout=0.5) as lead:
        assert "its secret" in refusal_of(lambda: join(port, dist_secret="wrong"))
        assert "dist_secret is set on node 0, and not on this node" in refusal_of(lambda: join(port))
        waited = refusal_of(lead.nodes.wait)
        assert "node 1 of 2 has not come" in waited and "within 0.5 s" in waited and "its secret" in waited
        assert "dist_secret, of which node 0 has one" in waited
    other = free_port()
    with leading(other, dist_timeout=0.5) as lead:
        assert "set on this node, and not on node 0" in refusal_of(lambda: join(other, dist_secret="s"))
        assert "dist_secret, of which node 0 has none" in refusal_of(lead.nodes.wait)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x02\0\0\0\x80\x04", b"\xff\xff\xff\x7f", b""])
def test_strangers_are_turned_away_and_nodes_come_nevertheless(data: bytes) -> None:
    """What looks like HTTP, like a pickle, or like a frame of two gigabytes."""
    port = free_port()
    with leading(port) as lead:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(data)
            if data:
                sock.settimeout(10)
                while sock.recv(4096):
                    pass
        stream = join(port)
        lead.nodes.wait()
        stream.close()


def test_a_node_that_is_not_there_is_told_by_both_sides() -> None:
    port = free_port()
    message = refusal_of(lambda: join(port, dist_timeout=0.3))
    assert f"node 0 at 127.0.0.1:{port} was not there for node 1 of 2 within 0.3 s (dist_timeout)" in message
    with leading(port, dist_timeout=0.1, tp_size=6, nnodes=3) as lead:
        assert "nodes 1, 2 of 3 have not come" in refusal_of(lead.nodes.wait)
        assert f"dist_init_addr: 127.0.0.1:{port} is in use" in refusal_of(lambda: Lead(port))
    assert "no address of this machine" in refusal_of(lambda: Lead(port, dist_init_addr=f"203.0.113.7:{port}"))


@pytest.mark.slow
def test_a_node_that_says_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phloem.launch.nodes.SILENT_NODE", 2)
    port = free_port()
    with leading(port) as lead:
        stream = join(port)
        lead.nodes.wait()
        time.sleep(0.8)  # before the beginning it need not say anything
        assert lead.lost.empty()
        lead.nodes.begin("shm", 1)
        assert "no sign of life" in lead.lost.get(timeout=5)
        stream.close()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"nnodes": 3}, r"nnodes 3: 4 ranks \(tp_size 4 x pp_size 1\) cannot be shared out; valid: 1, 2, 4"),
        ({"node_rank": 2}, r"node_rank 2: there are 2 nodes \(nnodes\), 0 to 1"),
        ({"nnodes": 1, "node_rank": 1}, "node_rank 1: nnodes is 1"),
        ({"node_rank": -1}, "node_rank: -1 is below 0"),
        ({"nnodes": 0}, "nnodes: 0 must be above 0"),
        ({"dist_timeout": 0}, "dist_timeout: 0.0 must be above 0"),
        ({"dist_init_addr": None}, "nnodes 2: dist_init_addr, HOST:PORT of node 0, is needed"),
        ({"dist_init_addr": "here"}, "dist_init_addr: 'here' is not HOST:PORT"),
        ({"dist_init_addr": "here:99999"}, "is not HOST:PORT"),
        ({"dist_init_addr": "0.0.0.0:5000"}, "every address of a machine"),
        ({"dist_init_addr": "0:5000"}, "every address of a machine"),
        ({"dist_init_addr": "[0:0::0]:5000"}, "every address of a machine"),
        ({"dp_size": 2}, "nnodes 2: dp_size 2: each replica is on one machine"),
    ],
)
def test_nodes_that_cannot_be_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Nodes.of(config_of(5000, **settings))


@pytest.mark.parametrize("host", ["a..b", "\u00e9" * 70])
def test_what_no_name_can_be_is_refused_by_the_option(host: str) -> None:
    with pytest.raises(ConfigError, match="dist_init_addr: "):
        resolve(host, 5000)
    with pytest.raises(ConfigError, match="host: "):
        bind(host, 0)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--enable-deterministic-inference"], "tp_size 2: sums over ranks are not the same bits for every tp_size"),
        (["--speculative-algorithm", "nextn"], "mtp cannot serve this model: a model that drafts runs on one rank"),
    ],
)
def test_what_several_ranks_do_not_serve_is_said_by_a_further_node(more: list[str], why: str, tmp_path: Path) -> None:
    """And told to node 0, where only this node was asked for it."""
    path, port = tiny_checkpoint("llama", tmp_path), free_port()
    with leading(port) as lead:
        other = FurtherNode(path, *options(port, tp=2), *more)
        try:
            assert other.wait() == 1
            eventually(lambda: any(why in line for line in other.lines), 5)
            assert why in refusal_of(lead.nodes.wait)
        finally:
            other.close()


def test_the_names_of_other_engines_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["m", "--tp", "2", "--nnodes", "2", "--node-rank", "1"]
    for more in (
        ["--dist-init-addr", "h:5000"],
        ["--nccl-init-addr", "h:5000"],
        ["--master-addr", "h", "--master-port=5000"],
    ):
        nodes = Nodes.of(parse("serve", [*base, *more])[0])
        assert (nodes.size, nodes.rank, nodes.each, nodes.host, nodes.port) == (2, 1, 1, "h", 5000)
    assert Config.from_flat({"master-addr": "::1", "master_port": 5}).nodes.dist_init_addr == "[::1]:5"
    with pytest.raises(ConfigError, match="master_addr: master_port must be given with it"):
        parse("serve", [*base, "--master-addr", "h"])
    with pytest.raises(ConfigError, match="dist_init_addr"):
        parse("serve", [*base, "--master-addr", "h", "--master-port", "1", "--dist-init-addr", "h:2"])
    monkeypatch.setenv("PHLOEM_DIST_SECRET", "s")
    assert parse("serve", base)[0].nodes.dist_secret == "s"


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2", "RANK": "1",
    "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500",
}  # fmt: skip


def test_torchrun_says_which_node_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    nodes = Nodes.of(parse("serve", ["m", "--tp", "2"])[0])
    assert (nodes.size, nodes.rank, nodes.host, nodes.port) == (2, 1, "h", 29501)  # at 29500 torchrun listens
    assert Nodes.of(parse("serve", ["m", "--tp", "2", "--node-rank", "0"])[0]).rank == 0
    assert parse("serve", ["m"])[0].nodes.nnodes == 1  # servers of one rank each
    with pytest.raises(ConfigError, match="nnodes 3: torchrun has started 2 nodes"):
        parse("serve", ["m", "--tp", "3", "--nnodes", "3"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--nproc-per-node 1"):
        parse("serve", ["m", "--tp", "2"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for name, value, why in (
        ("WORLD_SIZE", "", "WORLD_SIZE: it is not set, and other variables of torchrun are"),
        ("WORLD_SIZE", "two", "WORLD_SIZE: 'two' is no number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: 0 must be above 0"),
        ("WORLD_SIZE", "-3", "WORLD_SIZE: -3 must be above 0"),
        ("MASTER_PORT", "", "MASTER_PORT: it is not set"),
        ("MASTER_PORT", "http", "MASTER_PORT: 'http' is no number"),
        ("MASTER_ADDR", "", "MASTER_ADDR: it is not set, and MASTER_PORT is"),
    ):
        with monkeypatch.context() as half:
            half.setenv(name, value)
            with pytest.raises(ConfigError, match=why):
                parse("serve", ["m", "--tp", "2"])
            assert parse("serve", ["m"])[0].nodes.nnodes == 1
    with monkeypatch.context() as half:
        for name in ("RANK", "GROUP_RANK"):
            half.delenv(name)
        with pytest.raises(ConfigError, match="GROUP_RANK: it is not set"):
            parse("serve", ["m", "--tp", "2"])
    with monkeypatch.context() as half:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            half.delenv(name)
        with pytest.raises(ConfigError, match="MASTER_ADDR: it is not set, and other variables of torchrun are"):
            parse("serve", ["m", "--tp", "2"])
        assert Nodes.of(parse("serve", ["m", "--tp", "2", "--dist-init-addr", "k:7"])[0]).port == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("NODE_RANK", "1")
    assert parse("serve", ["m", "--tp", "2"])[0].nodes.nnodes == 1
    several = ["m", "--tp", "2", "--nnodes", "2", "--master-addr", "k", "--master-port", "1"]
    nodes = Nodes.of(parse("serve", several)[0])
    assert (nodes.rank, nodes.host, nodes.port) == (1, "k", 1)
    for number in ("x", "\u00b2", "1.5"):
        monkeypatch.setenv("NODE_RANK", number)
        with pytest.raises(ConfigError, match="NODE_RANK: "):
            parse("serve", several)


def test_checkpoints_are_told_apart(tmp_path: Path) -> None:
    """By what their configuration says, and by weights alone."""
    first, same, other = (tiny_checkpoint("llama", tmp_path / name) for name in ("a", "b", "c"))
    narrow = tiny_checkpoint("llama", tmp_path / "d", rope_theta=5000.0)
    data = bytearray((other / "model.safetensors").read_bytes())
    for at in range(len(data) - 5000, len(data) - 100):
        data[at] ^= 1
    (other / "model.safetensors").write_bytes(data)
    facts = [facts_of(config_of(1, model_path=str(path)), describe(str(path))) for path in (first, same, other, narrow)]
    assert differences(facts[0], facts[1], "node 1") == ""
    assert differences(facts[0], facts[2], "node 1").startswith("node 1 differs from node 0 (here): digest of the")
    assert "rope" in differences(facts[0], facts[3], "node 1")
    assert "dtype is float32 there, auto here" in differences(
        facts[0], facts_of(config_of(1, model_path=str(same), dtype="float32"), describe(str(same))), "node 1"
    )


@pytest.mark.parametrize(
    ("here", "there", "why"),
    [
        ({}, {"speculative_algorithm": "ngram"}, "speculative_algorithm is ngram there, None here"),
        ({"speculative_num_steps": 3}, {}, "speculative_num_steps is None there, 3 here"),
        ({"enable_lora": True}, {}, "enable_lora is False there, True here"),
        ({"max_lora_rank": 8}, {"max_lora_rank": 16}, "max_lora_rank is 16 there, 8 here"),
        ({"lora_paths": ["a=/x"]}, {"lora_paths": ["a=/y", "b=/x"]}, "adapters (lora_paths) is a, b there, a here"),
        ({"speculative_token_map": "FILE"}, {}, "tokens of drafts (speculative_token_map) is none there"),
        ({}, {"speculative_draft_model_path": "/no"}, "(speculative_draft_model_path) is unreadable (/no"),
    ],
)
def test_drafts_and_adapters_are_compared(
    here: dict[str, Any], there: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = str(tiny_checkpoint("llama", tmp_path))
    (tmp_path / "map.json").write_text("[1, 2]")
    facts = [
        facts_of(
            config_of(
                1, model_path=path, **{n: str(tmp_path / "map.json") if v == "FILE" else v for n, v in one.items()}
            ),
            describe(path),
        )
        for one in (here, there)
    ]
    assert why in differences(facts[0], facts[1], "node 1")


def test_models_that_draft_are_told_apart(tmp_path: Path) -> None:
    """By what they are, not by where they lie."""
    first, same, other = (str(tiny_checkpoint(name, tmp_path / at)) for name, at in (("llama", "a"), ("llama", "b"),
                                                                                     ("qwen3", "c")))  # fmt: skip
    facts = [
        facts_of(config_of(1, model_path=first, speculative_draft_model_path=path), describe(first))
        for path in (first, same, other)
    ]
    assert differences(facts[0], facts[1], "node 1") == ""
    assert "model that drafts (speculative_draft_model_path) is qwen3" in differences(facts[0], facts[2], "node 1")


def test_doctor_says_how_far_the_other_nodes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tiny_checkpoint("llama", tmp_path))
    monkeypatch.setattr("phloem.launch.checkup.LOAD", 1 << 20)
    found: dict[int, list[tuple[str, str]]] = {}

    def look(rank: int, port: int, **settings: Any) -> None:
        found[rank] = checkup.look(config_of(port, model_path=path, node_rank=rank, **settings))

    port = free_port()
    other = threading.Thread(target=look, args=(1, port))
    other.start()
    look(0, port)
    other.join(10)
    (own, _), (name, link) = found[0]
    assert own == "node 0" and name == "node 1 of 2 (127.0.0.1)"
    assert "same versions" in link and "us there and back" in link and "its clock is 0." in link
    assert found[1][0][1] == found[0][0][1] and "digest of the weights" in found[1][0][1]
    port = free_port()
    errors: queue.SimpleQueue[str] = queue.SimpleQueue()
    other = threading.Thread(target=lambda: errors.put(refusal_of(lambda: look(1, port, dtype="float32"))))
    other.start()
    assert "dtype is float32 there, auto here" in refusal_of(lambda: look(0, port))
    assert "dtype is float32 there, auto here" in errors.get(timeout=10)
    other.join(10)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("serve", "command is phloem serve there, phloem doctor --nodes here"),
        ("doctor --nodes", r"^node 1 of 2 \(127.0.0.1\) has gone$"),
    ],
)
def test_a_look_ends_at_once_where_the_other_node_serves_or_goes(command: str, why: str, tmp_path: Path) -> None:
    path, port = str(tiny_checkpoint("llama", tmp_path)), free_port()
    config = config_of(port, model_path=path, node_rank=1)

    def come_and_go() -> None:
        with suppress(ConfigError):
            stream = joined(config, Nodes.of(config), facts_of(config, describe(path), command), threading.Event())
            assert stream.read(10) is not None  # it is asked for an answer
            stream.close()

    other = threading.Thread(target=come_and_go)
    other.start()
    with pytest.raises(PhloemError, match=why):
        checkup.look(config_of(port, model_path=path, dist_timeout=3))
    other.join(10)


def test_doctor_with_one_node_has_nobody_to_meet(capsys: pytest.CaptureFixture[str]) -> None:
    assert not doctor._nodes(Config())  # pyright: ignore[reportPrivateUsage]
    assert "nnodes is 1" in capsys.readouterr().out
