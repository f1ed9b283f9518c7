"""Ranks with a graphics card each, without one: their places, and servers on stand-ins for cards, NCCL and DeepEP.

The stand-in for NCCL says so where ranks call different things, or tensors of different sizes: a real one would wait.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from nodes_support import FurtherNode, free_port
from nodes_support import options as nodes
from served import Server, eventually, gone, ranks_of
from share_support import checkpoint

from phloem import Engine, platforms
from phloem.core.config import Config
from phloem.core.errors import ConfigError, EngineDead
from phloem.distributed.choose import choose, on_host
from phloem.distributed.comm import Threads
from phloem.distributed.groups import Groups
from phloem.engine.ranks import cards
from phloem.launch.ranks import decision_of
from phloem.launch.replicas import placed
from phloem.platforms._facts import StepFacts
from phloem.platforms._streams import Streams

SUPPORT = Path(__file__).parents[1] / "support"
LONG = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 2
TEXTS = (LONG, "Sap", "hello world")
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
DRAWN = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 8, "sampling_seed": 5, "ignore_eos": True}
SIZES: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 1024, "chunked_prefill_size": 32}
MOE: dict[str, Any] = {"tp_size": 2, "ep_size": 2}


class Cards:
    """Of a platform that is not there."""

    facts = StepFacts(meets="nccl")
    there = 4

    @classmethod
    def cards(cls) -> int:
        return cls.there

    @staticmethod
    def take(card: int) -> torch.device:
        return torch.device("meta", card)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda is here, with four cards."""
    monkeypatch.setattr(platforms, "cards_of", lambda name: Cards if name == "cuda" else None)
    available = SimpleNamespace(get=lambda name: lambda: (True, ""))
    monkeypatch.setattr(platforms, "AVAILABLE", available)


def on_cards(**settings: Any) -> Config:
    return Config.from_flat({"device": "cuda", **settings})


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"tp_size": 4}, [0, 1, 2, 3]),
        ({"tp_size": 2, "base_gpu_id": 1, "gpu_id_step": 2}, [1, 3]),
        ({"tp_size": 2, "pp_size": 2}, [0, 1, 2, 3]),
        ({"tp_size": 4, "nnodes": 2, "dist_init_addr": "h:1", "base_gpu_id": 2}, [2, 3, 2, 3]),
        ({"tp_size": 1, "base_gpu_id": 3}, [3]),
    ],
)
def test_each_rank_takes_the_next_card_of_its_machine(
    settings: dict[str, Any], numbers: list[int], pretended: None
) -> None:
    config = on_cards(**settings)
    cards.refuse(config)
    assert [cards.take(config, rank).index for rank in range(len(numbers))] == numbers


def test_one_rank_has_the_card_that_its_process_has(pretended: None) -> None:
    cards.refuse(on_cards())
    assert cards.take(on_cards(), 0) == torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"tp_size": 8},
            "tp_size 8: 8 cards from number 0 on (base_gpu_id) need 8 of this machine's, and 4 are visible",
        ),
        (
            {"pp_size": 2, "base_gpu_id": 2, "gpu_id_step": 2},
            "pp_size 2: 2 cards from number 2 on (base_gpu_id), 2 apart (gpu_id_step) need 5",
        ),
        (
            {"dp_size": 5, "base_gpu_id": 4},
            "dp_size 5: a card from number 4 on (base_gpu_id) needs 5 of this machine's",
        ),
        ({"tp_size": 2, "nnodes": 2, "use_ray": True}, "use_ray: Ray hides cuda devices from what it starts"),
        ({"pp_size": 2, "enable_dynamic_chunking": True}, "enable_dynamic_chunking: how long a stage computes"),
    ],
)
def test_too_few_cards_are_refused_with_how_many_there_are(settings: dict[str, Any], why: str, pretended: None) -> None:
    with pytest.raises(ConfigError) as caught:
        cards.refuse(on_cards(**settings))
    assert why in caught.value.message


def test_a_card_that_is_not_there_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="device 'cuda' is not available: this torch"):
        cards.refuse(on_cards(tp_size=2))
    with pytest.raises(ConfigError, match="base_gpu_id: xpu devices are not chosen by number"):
        cards.refuse(Config.from_flat({"device": "xpu", "base_gpu_id": 1}))
    with pytest.raises(ConfigError, match="gpu_id_step: 0 must be above 0"):
        on_cards(gpu_id_step=0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tp_comm": "nccl"}, "tp_comm: nccl is for ranks with a graphics card each, and these run on processors"),
        ({"base_gpu_id": 1}, "base_gpu_id: it numbers graphics cards, and this runs on cpu: leave it out"),
        ({"gpu_id_step": 2}, "gpu_id_step: it numbers graphics cards, and this runs on cpu"),
        ({"gpu_id_step": 2, "tp_size": 2}, "gpu_id_step: it numbers graphics cards, and this runs on cpu"),
        ({"base_gpu_id": 1, "tp_size": 2}, "base_gpu_id: it numbers graphics cards"),
    ],
)
def test_what_is_of_cards_alone_is_refused_on_processors(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cards.refuse(Config.from_flat({"device": "cpu", **settings}))
    assert why in caught.value.message and caught.value.param in settings


def test_what_says_nothing_is_taken_on_processors() -> None:
    for settings in ({}, {"base_gpu_id": 0}, {"tp_comm": "gloo"}, {"tp_size": 2, "tp_comm": "shm"}):
        cards.refuse(Config.from_flat({"device": "cpu", **settings}))
    for rank in range(2):
        cards.refuse(placed(Config.from_flat({"device": "cpu", "dp_size": 2}), rank))


def test_replicas_take_the_cards_behind_each_other() -> None:
    config = on_cards(dp_size=3, tp_size=2, base_gpu_id=1, gpu_id_step=2)
    assert [placed(config, rank).runtime.base_gpu_id for rank in range(3)] == [1, 5, 9]
    assert [placed(on_cards(dp_size=2), rank).runtime.base_gpu_id for rank in range(2)] == [0, 1]


def test_ranks_on_cards_meet_by_nccl_and_say_so() -> None:
    name, why = choose("auto", meets="nccl")
    assert name == "nccl" and "step graphs hold" in why and choose("nccl", meets="nccl") == ("nccl", "as asked")
    assert on_host("nccl") == choose("auto")[0] and on_host("gloo") == "gloo"
    for other in ("shm", "gloo"):
        with pytest.raises(ConfigError, match=f"tp_comm: {other} adds in the host's memory"):
            choose(other, meets="nccl")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nccl is for ranks with a graphics card each"):
        choose("nccl")
    told = decision_of(on_cards(tp_size=2, base_gpu_id=4), name, why).reason
    assert "a graphics card each, here 4, 5; ranks meet by nccl" in told
    across = on_cards(tp_size=4, nnodes=2, dist_init_addr="h:1")
    assert "whose ranks meet by nccl; a graphics card each, here 0, 1" in decision_of(across, name, why).reason


def test_values_that_come_once_ranks_were_ended_are_given_to_nobody() -> None:
    """A device lets go what waits in a group that was ended, and what comes behind it computes with what is there."""

    class Event:
        def record(self, stream: Any = None) -> None: ...

        def synchronize(self) -> None: ...

    class Stream:
        def __init__(self, device: Any) -> None: ...

        def wait_event(self, event: Any) -> None: ...

    class Ended:
        def check(self) -> None:
            raise EngineDead("the group was ended")

        def abort(self) -> None: ...

    cuda = SimpleNamespace(Stream=Stream, Event=Event, stream=lambda one: torch.inference_mode())
    streams = Streams(torch.device("cpu"), cuda=cuda, pin=False)
    groups = Groups(tp=Threads.group(1)[0])
    streams.check = groups.check
    assert streams.down([torch.ones(2)]).wait()[0].tolist() == [1, 1]
    streams.check = Groups(tp=Ended()).check  # type: ignore[arg-type]
    coming = streams.down([torch.ones(2)])
    with pytest.raises(EngineDead, match="was ended"):
        coming.wait()


# --- servers, whose processes know a platform `card`


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Processes that are started find cards, and what belongs to them."""
    places = [SUPPORT / "card_stand_in", SUPPORT / "npu_stand_in", SUPPORT]
    paths = [*map(str, places), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("ASCEND_HOME_PATH", "somewhere")
    return monkeypatch


def arguments(**settings: Any) -> list[str]:
    flat = {"device": "card", **SIZES, **settings}
    return [f"--{name.replace('_', '-')}={value}" for name, value in flat.items()]


def expected(path: Path) -> list[Any]:
    """What one rank answers, on the processor."""
    with Engine(model_path=str(path), device="cpu", ops="reference", **SIZES) as engine:
        return [[one["output_ids"] for one in engine.generate(list(TEXTS), params)] for params in (GREEDY, DRAWN)]  # type: ignore[index]


def answered(server: Server) -> list[Any]:
    bodies = [{"text": list(TEXTS), "sampling_params": params} for params in (GREEDY, DRAWN)]
    found = [httpx.post(server.url + "/generate", json=body, timeout=120).json() for body in bodies]
    return [[one["output_ids"] for one in answer] for answer in found]


def decided(server: Server) -> dict[str, tuple[Any, str]]:
    return {name: (value, why) for name, value, why in server.get("/server_info").json()["decisions"]}


@pytest.mark.slow
@pytest.mark.some(3)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"pp_size": 2}),
        ("llama", {"pp_size": 2, "tp_size": 2}),
        ("llama", {"tp_size": 2, "attn_cp_size": 2}),
        ("qwen3_moe", MOE),
        ("qwen3_moe", {**MOE, "attn_dp_size": 2, "moe_a2a_backend": "torch"}),
        ("qwen3_moe", {**MOE, "attn_dp_size": 2, "moe_a2a_backend": "deepep"}),
        ("qwen3_moe", {**MOE, "attn_dp_size": 2, "moe_a2a_backend": "deepep_low_latency"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{key[:2]}{size}" for key, size in value.items()),
)
def test_ranks_on_cards_answer_as_one_does(
    name: str, settings: dict[str, Any], tmp_path: Path, stand_in: pytest.MonkeyPatch
) -> None:
    path = checkpoint(name, tmp_path)
    want = expected(path)
    stand_in.setenv("CARDS", "4")
    server = Server(path, *arguments(**settings))
    try:
        server.wait_ready()
        found = answered(server)
        rounds = "deepep" in settings.get("moe_a2a_backend", "")  # its rows are bfloat16: what is drawn may differ
        assert found[0] == want[0] and (rounds or found[1] == want[1])
        value, why = decided(server)["tp_size"]
        assert value == settings.get("tp_size", 1) and "a graphics card each" in why and "nccl" in why
    finally:
        server.close()


@pytest.mark.slow
def test_graphs_of_ranks_are_replayed_by_all_of_them_and_a_rank_that_dies_ends_all(
    tmp_path: Path, stand_in: pytest.MonkeyPatch
) -> None:
    """Decode steps and pieces of prompts; the second rank fails to record the second size that is asked for. Requests
    that ran when a rank was killed are answered at once, and may be tried again; the same answers come then."""
    path = checkpoint("llama", tmp_path)
    want = expected(path)
    stand_in.setenv("CARDS_RECORD", "1:2")
    server = Server(path, *arguments(tp_size=2, max_running_requests=4))
    try:
        server.wait_ready(180)
        assert answered(server) == want
        ways = decided(server)
        assert "recorded" in ways["step_graphs"][1] and "recorded" in ways["piecewise_graphs"][1]
        assert ways["memory"][0] == "3.8 GiB", "that of the second card, which has the least"
        graphs = server.state()["prepared"]["graphs"]
        assert graphs["step_graphs"]["recorded"] > 1 and graphs["piecewise_graphs"]["recorded"] > 1
        assert not graphs["step_graphs"]["given_up"], "it was tried again"
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        askers = [threading.Thread(target=lambda: answers.put(server.generate("a story", 450))) for _ in range(2)]
        for asker in askers:
            asker.start()
        eventually(lambda: server.state()["running"] == 2)
        (rank,) = ranks_of(server.engine_pid())
        os.kill(rank, signal.SIGKILL)
        begun = time.monotonic()
        for _ in askers:
            answer = answers.get(timeout=20)
            assert answer.status_code == 503 and "rank 1 of 2" in answer.text and "SIGKILL" in answer.text
            assert answer.json()["error"]["retryable"] if "error" in answer.json() else "retryable" in answer.text
        assert time.monotonic() - begun < 15 and gone(rank)
        eventually(lambda: server.get("/health").status_code == 200, 180)
        assert answered(server) == want
    finally:
        server.close()


@pytest.mark.slow
def test_a_card_that_hangs_is_given_up(tmp_path: Path, stand_in: pytest.MonkeyPatch) -> None:
    """Its process lives, so that nobody but who waits for it can know."""
    path, hangs = checkpoint("llama", tmp_path), tmp_path / "hang"
    stand_in.setenv("CARDS_HANG", str(hangs))
    server = Server(path, *arguments(tp_size=2, watchdog_timeout=4))
    try:
        server.wait_ready(180)
        expected = server.generate("hello world").json()["output_ids"]
        hangs.touch()
        answer = server.generate("hello world")
        assert answer.status_code == 503 and "(watchdog_timeout): the card of a rank hangs" in answer.text
        hangs.unlink()
        eventually(lambda: server.get("/health").status_code == 200, 180)
        assert server.generate("hello world").json()["output_ids"] == expected
    finally:
        server.close()


@pytest.mark.slow
def test_nodes_of_one_card_each_answer_as_one_rank_does(tmp_path: Path, stand_in: pytest.MonkeyPatch) -> None:
    path = checkpoint("llama", tmp_path)
    want, port = expected(path), free_port()
    stand_in.setenv("CARDS", "1")
    other = FurtherNode(path, *arguments(tp_size=2), *nodes(port))
    server = Server(path, *arguments(tp_size=2), *nodes(port))
    try:
        server.wait_ready(180)
        assert answered(server) == want
        assert "2 nodes (nnodes), whose ranks meet by nccl" in decided(server)["tp_size"][1]
    finally:
        server.close()
        other.close()


@pytest.mark.slow
def test_a_node_with_too_few_cards_ends_the_start_of_all(tmp_path: Path, stand_in: pytest.MonkeyPatch) -> None:
    path, port = checkpoint("llama", tmp_path), free_port()
    stand_in.setenv("CARDS", "1")
    other = FurtherNode(path, *arguments(tp_size=2, base_gpu_id=1), *nodes(port))
    server = Server(path, *arguments(tp_size=2), *nodes(port))
    try:
        assert server.process.wait(120) != 0 and other.wait(60) != 0
        why = "a card from number 1 on (base_gpu_id) needs 2 of this machine's, and 1 is visible"
        for lines in (server.lines, other.lines):
            eventually(lambda lines=lines: any(why in line for line in lines), 5)
    finally:
        server.close()
        other.close()


@pytest.mark.slow
def test_replicas_have_a_card_each(tmp_path: Path, stand_in: pytest.MonkeyPatch) -> None:
    path = checkpoint("llama", tmp_path)
    want = expected(path)
    server = Server(path, *arguments(dp_size=2))
    try:
        server.wait_ready(180)
        body = {"text": LONG, "sampling_params": GREEDY}
        for rank in (0, 1):
            one = httpx.post(server.url + "/generate", json={**body, "routed_dp_rank": rank}, timeout=120).json()
            assert one["output_ids"] == want[0][0] and one["meta_info"]["dp_rank"] == rank
    finally:
        server.close()
    stand_in.setenv("CARDS", "1")
    few = Server(path, *arguments(dp_size=2))
    try:
        assert few.process.wait(120) != 0
        why = "dp_size 2: a card from number 1 on (base_gpu_id) needs 2 of this machine's, and 1 is visible"
        eventually(lambda: any(why in line for line in few.lines), 5)
    finally:
        few.close()


MIXED = """
import json, sys
from loads import answers, load
from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.launch.core import EngineCore

config = Config.from_flat(json.loads(sys.argv[1]))
core = EngineCore(config, describe(config.model.model_path), lambda message: None)
try:
    read = [] if core._ranks is None else core._ranks.bytes_read
    print(json.dumps([answers(core, load()), read]))
finally:
    core.close()
"""


@pytest.mark.slow
@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("name", "settings", "records"),
    [
        ("llama", {"tp_size": 2}, "all"),
        ("llama", {"tp_size": 2, "speculative_algorithm": "suffix", "disable_speculative_adaptive": True}, ""),
        ("qwen3_moe", {**MOE, "attn_dp_size": 2}, ""),
        ("qwen3_moe", {**MOE, "pp_size": 2}, ""),
    ],
    ids=["graphs", "drafts", "groups", "stages"],
)
def test_all_that_a_scheduler_does_is_answered_as_on_one_rank(
    name: str, settings: dict[str, Any], records: str, tmp_path: Path, stand_in: pytest.MonkeyPatch
) -> None:
    """With prefix hits, chunks, preemption, grammars, penalties and log probabilities."""
    options: dict[str, Any] = {
        "model_path": str(checkpoint(name, tmp_path)), "dtype": "float32", "max_total_tokens": 160, "page_size": 8,
        "context_length": 128, "chunked_prefill_size": 16, "max_running_requests": 4, "debug_invariants": True,
        "random_seed": 1, "threads": 1, "log_level": "error",
    }  # fmt: skip
    stand_in.setenv("CARDS", "4")

    def found(**more: Any) -> tuple[dict[str, Any], list[int]]:
        command = [sys.executable, "-c", MIXED, json.dumps({**options, **more})]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    want, _ = found(device="cpu", ops="reference")
    stand_in.setenv("CARDS_RECORD", records)
    got, read = found(device="card", **settings)
    whole = sum(file.stat().st_size for file in Path(options["model_path"]).glob("*.safetensors"))
    assert max(read) < whole * 0.75, "each rank reads what it has, and no more"
    for key, (ids, values, prompt) in want.items():
        assert got[key][0] == ids and len(ids) > 3, key
        assert got[key][1] == pytest.approx(values, abs=1e-4), key
        assert got[key][2] == pytest.approx(prompt, abs=1e-4, nan_ok=True), key
