"""Several engines behind one door: over engines without a model what is routed and restarted, and a real server."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from door import Door, make_info, open_door
from served import Server, eventually, gone
from share_support import checkpoint

from phloem import Engine
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.core.messages import ControlReply, Failed, Ready, Reweighted, Stats
from phloem.launch.replicas import Replicas
from phloem.testing.fake_engine import FakeEngine

ASK = {"text": "hello", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}


class Fleet:
    """Engines without a model, and a door before them."""

    def __init__(self, size: int = 2, config: dict[str, Any] | None = None, **engine: Any) -> None:
        self.made: list[FakeEngine] = []
        self.settings = {"dp_size": size, **(config or {})}
        self._engine = engine
        self.full = False  # no other one can be started

    def start(self, rank: int) -> FakeEngine:
        del rank
        if self.full:
            raise OSError("no process is left")
        self.made.append(FakeEngine(**self._engine))
        return self.made[-1]

    def run(self, work: Callable[[Door], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            link: Any = Replicas(Config.from_flat(self.settings), self.start)
            link.ready = self._engine.get("ready", True)
            size = self.settings["dp_size"]
            info = make_info(replicas=size, features=frozenset({"data_parallel"}))
            async with open_door(link, info, **self.settings) as door:
                await work(door)

        asyncio.run(main())


async def until(check: Callable[[], Any], seconds: float = 5) -> None:
    for _ in range(int(seconds / 0.01)):
        if check():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen in time")


def test_requests_are_shared_out_and_answered_with_their_rank() -> None:
    fleet = Fleet(config={"load_balance_method": "round_robin"})

    async def work(door: Door) -> None:
        one = (await door.post("/generate", ASK)).json()
        several = await asyncio.gather(*(door.post("/generate", ASK) for _ in range(6)))
        assert {answer.json()["text"] for answer in several} == {one["text"]}
        ranks = [answer.json()["meta_info"]["dp_rank"] for answer in several]
        assert sorted(ranks) == [0, 0, 0, 1, 1, 1]
        assert [len(engine.submits) for engine in fleet.made] == [4, 3]

    fleet.run(work)


@pytest.mark.slow
def test_steps_of_two_engines_are_told_apart() -> None:
    """Each names its requests only when they change, and the door hears both at once."""
    fleet = Fleet(mode="hash", delay=0.001)

    async def work(door: Door) -> None:
        def ask(at: int, rank: int) -> Any:
            params = {"max_new_tokens": 40, "temperature": 0}
            return door.post("/generate", {"text": f"text {at}", "sampling_params": params, "routed_dp_rank": rank})

        alone = [(await ask(at, at % 2)).json()["output_ids"] for at in range(6)]
        found = await asyncio.gather(*(ask(at, at % 2) for at in range(6)))
        assert [answer.json()["output_ids"] for answer in found] == alone
        assert [answer.json()["meta_info"]["dp_rank"] for answer in found] == [0, 1] * 3

    fleet.run(work)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_every_route_takes_a_rank(path: str) -> None:
    fleet = Fleet()
    body: dict[str, Any] = {"text": "a"} if path == "/generate" else {"prompt": "a"}
    body = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else body
    body = {"input": "a"} if "responses" in path else body

    async def work(door: Door) -> None:
        for name in ("data_parallel_rank", "routed_dp_rank"):
            answer = await door.post(path, {**body, name: 1})
            assert answer.status_code == 200, answer.text
        assert [len(engine.submits) for engine in fleet.made] == [0, 2]
        answer = await door.post(path, {**body, "data_parallel_rank": 2})
        assert answer.status_code == 400 and "not one of the 2" in answer.text
        answer = await door.post(path, {**body, "data_parallel_rank": 0, "routed_dp_rank": 1})
        assert answer.status_code == 400 and "two names of one thing" in answer.text

    fleet.run(work)


def test_one_engine_refuses_the_second_rank() -> None:
    async def main() -> None:
        async with open_door() as door:
            assert (await door.post("/generate", {**ASK, "data_parallel_rank": 0})).status_code == 200
            answer = await door.post("/generate", {**ASK, "data_parallel_rank": 1})
            assert answer.status_code == 400 and "data_parallel_rank" in answer.text

    asyncio.run(main())


def test_administration_reaches_all_engines() -> None:
    fleet = Fleet(3)

    async def work(door: Door) -> None:
        for path, name in (("/flush_cache", "flush_cache"), ("/pause_generation", "pause")):
            answer = await door.post(path, {})
            assert answer.status_code == 200, answer.text
            assert [engine.controls[-1].name for engine in fleet.made] == [name] * 3
        await door.post("/continue_generation", {})
        fleet.made[1].control_reply = ControlReply(id="", ok=False, message="requests run")
        answer = await door.post("/flush_cache", {})
        assert answer.status_code == 400 and "data parallel rank 1: requests run" in answer.text

    fleet.run(work)


def test_figures_are_told_by_rank() -> None:
    fleet = Fleet()

    async def work(door: Door) -> None:
        for rank, engine in enumerate(fleet.made):
            engine.say(Stats(running=rank, waiting=rank, used_tokens=10 * rank, total_tokens=100, gen_throughput=5))
        await until(lambda: door.client.connection.stats.used_tokens == 10)
        loads = (await door.http.get("/v1/loads")).json()
        assert loads["dp_rank_count"] == 2 and [one["dp_rank"] for one in loads["loads"]] == [0, 1]
        assert [one["num_used_tokens"] for one in loads["loads"]] == [0, 10]
        assert loads["aggregate"]["total_gen_throughput"] == 10
        (one,) = (await door.http.get("/v1/loads?dp_rank=1")).json()["loads"]
        assert one["dp_rank"] == 1 and one["token_usage"] == 0.1
        gauges = (await door.http.get("/v1/loads?format=prometheus")).text
        assert 'phloem_load_num_used_tokens{dp_rank="1"} 10.0' in gauges
        metrics = (await door.http.get("/metrics")).text
        assert 'phloem:num_used_tokens{dp_rank="1",model_name="tiny"} 10.0' in metrics
        assert 'phloem:engine_up{dp_rank="0",model_name="tiny"} 1.0' in metrics
        info = (await door.http.get("/server_info")).json()
        assert info["dp_size"] == 2 and [state["dp_rank"] for state in info["internal_states"]] == [0, 1]
        assert [state["total_tokens"] for state in info["internal_states"]] == [100, 100]
        decisions = {name: value for name, value, _ in info["decisions"]}
        assert decisions["dp_size"] == 2 and decisions["load_balance_method"] == "auto"

    fleet.run(work)


def test_an_engine_that_dies_takes_its_own_requests_and_comes_again() -> None:
    fleet = Fleet(delay=0.005)

    async def work(door: Door) -> None:
        asks = {**ASK, "sampling_params": {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}}
        tasks = [asyncio.create_task(door.post("/generate", {**asks, "routed_dp_rank": rank})) for rank in (0, 1, 1)]
        await until(lambda: [len(engine.submits) for engine in fleet.made] == [1, 2])
        await asyncio.sleep(0.05)
        await door.post("/pause_generation", {"mode": "in_place"})
        await door.post("/continue_generation", {})
        fleet.made[1].die("it was killed by SIGKILL")
        answers = [await task for task in tasks]
        assert [answer.status_code for answer in answers] == [200, 503, 503]
        for answer in answers[1:]:
            assert "data parallel rank 1 of 2 has gone" in answer.text and "SIGKILL" in answer.text
            assert answer.headers["retry-after"] and answer.json()["error"]["type"] == "engine_unavailable"
        await until(lambda: len(fleet.made) == 3 and door.client.connection.replicas[1].ready is not None)
        assert fleet.made[1].closed and fleet.made[0].controls[-1].name == "resume"
        answer = await door.post("/generate", {**ASK, "routed_dp_rank": 1})
        assert answer.status_code == 200 and len(fleet.made[2].submits) == 1
        assert (await door.http.get("/health")).status_code == 200

    fleet.run(work)


def test_what_an_engine_missed_it_is_told_when_it_comes_again() -> None:
    fleet = Fleet()

    async def work(door: Door) -> None:
        await door.post("/pause_generation", {"mode": "in_place"})
        fleet.made[0].die()
        await until(lambda: len(fleet.made) == 3 and fleet.made[2].controls)
        assert fleet.made[2].controls[-1].name == "pause"

    fleet.run(work)


def test_while_an_engine_is_away_the_others_take_what_comes() -> None:
    fleet = Fleet()

    async def work(door: Door) -> None:
        fleet._engine["ready"] = False  # pyright: ignore[reportPrivateUsage]
        fleet.made[1].die()
        await until(lambda: len(fleet.made) == 3)
        answers = await asyncio.gather(*(door.post("/generate", ASK) for _ in range(4)))
        assert {answer.json()["meta_info"]["dp_rank"] for answer in answers} == {0}
        answer = await door.post("/generate", {**ASK, "routed_dp_rank": 1})
        assert answer.status_code == 503 and "data parallel rank 1 does not serve now" in answer.text
        answer = await door.post("/update_weights_from_disk", {"model_path": "/elsewhere"})
        assert answer.status_code == 400 and "data parallel rank 1" in answer.text
        states = (await door.http.get("/server_info")).json()["internal_states"]
        assert "starts again" in states[1]["stale"] and "stale" not in states[0]
        assert (await door.http.get("/health")).status_code == 200

    fleet.run(work)


@pytest.mark.parametrize(
    ("config", "why"),
    [({"on_engine_death": "exit"}, "rank 1 of 2 has gone"), ({"max_engine_restarts": 0}, "were started in its place")],
)
def test_all_end_where_that_is_asked_for(config: dict[str, Any], why: str) -> None:
    fleet = Fleet(config=config, delay=0.01)

    async def work(door: Door) -> None:
        task = asyncio.create_task(door.post("/generate", {**ASK, "routed_dp_rank": 0}))
        await until(lambda: fleet.made[0].submits)
        fleet.made[1].die()
        answer = await task
        assert answer.status_code == 503 and why in (door.client.dead or "")
        await until(lambda: all(engine.closed for engine in fleet.made))
        assert len(fleet.made) == 2

    fleet.run(work)


def test_weights_that_have_changed_are_not_mixed_with_those_of_the_start() -> None:
    fleet = Fleet()

    async def work(door: Door) -> None:
        for engine in fleet.made:
            engine.say(Reweighted(version="2"))
        await until(lambda: door.client.weight_version == "2")
        fleet.made[0].die()
        await until(lambda: door.client.dead is not None)
        assert len(fleet.made) == 2 and "data parallel rank 0 of 2 has gone" in (door.client.dead or "")

    fleet.run(work)


@pytest.mark.slow
def test_engines_that_disagree_about_weights_end() -> None:
    fleet = Fleet()

    async def work(door: Door) -> None:
        fleet.made[0].control_reply = ControlReply(id="", ok=True, message="done")
        fleet.made[1].control_reply = ControlReply(id="", ok=False, message="no space is left")
        answer = await door.post("/update_weights_from_disk", {"model_path": "/elsewhere"})
        assert answer.status_code == 503 and "engines disagree" in answer.text and "no space is left" in answer.text

    fleet.run(work)


def test_no_engine_sleeps_while_another_has_requests() -> None:
    fleet = Fleet(delay=0.005)

    async def work(door: Door) -> None:
        asks = {**ASK, "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}, "routed_dp_rank": 1}
        task = asyncio.create_task(door.post("/generate", asks))
        await until(lambda: fleet.made[1].submits)
        answer = await door.post("/release_memory_occupation", {})
        assert answer.status_code == 400 and "data parallel rank 1: 1 request is running" in answer.text
        await door.post("/pause_generation", {"mode": "in_place"})
        assert (await door.post("/release_memory_occupation", {})).status_code == 400
        assert [control.name for engine in fleet.made for control in engine.controls] == ["pause", "pause"]
        await door.post("/pause_generation", {"mode": "retract"})
        assert (await door.post("/release_memory_occupation", {})).status_code == 200
        assert [engine.controls[-1].name for engine in fleet.made] == ["release_memory"] * 2
        assert door.client.dead is None
        task.cancel()

    fleet.run(work)


def test_an_engine_that_cannot_be_started_again_ends_all() -> None:
    fleet = Fleet()

    async def work(door: Door) -> None:
        fleet.full = True
        fleet.made[1].die("it was killed by SIGKILL")
        await until(lambda: door.client.dead is not None)
        assert "SIGKILL; none could be started in its place: OSError: no process is left" in (door.client.dead or "")
        assert all(engine.closed for engine in fleet.made) and len(fleet.made) == 2

    fleet.run(work)


def test_an_engine_that_cannot_start_ends_the_start() -> None:
    fleet = Fleet(ready=False)

    async def work(door: Door) -> None:
        fleet.made[0].say(Ready(info={}))
        fleet.made[1].say(Failed(error="no such file", kind="ModelLoadError"))
        await until(lambda: door.client.dead is not None)
        assert "ModelLoadError: no such file" in (door.client.dead or "")
        assert door.client.connection.failed is not None

    fleet.run(work)


@pytest.mark.slow
def test_an_engine_that_hangs_is_ended_alone() -> None:
    fleet = Fleet(config={"engine_hang_timeout": 0.5})

    async def work(door: Door) -> None:
        async def beat() -> None:
            while True:
                fleet.made[0].say(Stats())
                for engine in fleet.made[2:]:
                    engine.say(Stats())
                await asyncio.sleep(0.05)

        beats = asyncio.create_task(beat())
        fleet.made[1].paused = True
        task = asyncio.create_task(door.post("/generate", {**ASK, "routed_dp_rank": 1}))
        await until(lambda: fleet.made[1].closed)
        fleet.made[1].die("closed")  # what ends is an engine whose link is closed
        answer = await task
        assert answer.status_code == 503 and "hung for" in answer.text
        await until(lambda: len(fleet.made) == 3)
        assert not fleet.made[0].closed
        beats.cancel()

    fleet.run(work)


def test_options_of_replicas_are_checked(tmp_path: Path) -> None:
    for name in ("dp", "dp_size", "data-parallel-size"):
        assert Config.from_flat({name: 3}).runtime.dp_size == 3
    with pytest.raises(ConfigError, match="dp_size: 0 must be above 0"):
        Config.from_flat({"dp": 0})
    with pytest.raises(ConfigError, match="load_balance_method: 'follow_bootstrap_room' is not one of auto"):
        Config.from_flat({"load_balance_method": "follow_bootstrap_room"})
    with pytest.raises(ConfigError, match=r"enable_dp_attention: how many groups .* must be said with dp_size"):
        Config.from_flat({"enable_dp_attention": True})
    config = Config.from_flat({"dp_size": 2, "kv_events_config": '{"publisher": "zmq"}'})
    with pytest.raises(ConfigError, match="dp_size 2: kv_events_config: each replica"):
        Replicas(config, lambda rank: FakeEngine())


def children_of(pid: int) -> list[int]:
    """The processes that a process, or a thread of it, has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")
def test_a_server_of_two_replicas_serves_on_when_a_rank_of_one_is_killed(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    options = ("--dtype", "float32", "--ops", "reference", "--max-total-tokens", "2048")
    server = Server(path, *options, "--dp", "2", "--tp", "2", "--load-balance-method", "round_robin").wait_ready()
    try:
        answers = [server.generate("hello world", 24).json() for _ in range(4)]
        assert len({tuple(answer["output_ids"]) for answer in answers}) == 1, "both have the same model"
        assert [answer["meta_info"]["dp_rank"] for answer in answers] == [0, 1, 0, 1]
        engines = children_of(server.process.pid)
        pids = [*engines, *(rank for engine in engines for rank in children_of(engine))]
        assert len(engines) == 2 and len(pids) == 4
        ended: queue.SimpleQueue[httpx.Response] = queue.SimpleQueue()

        def ask(rank: int, count: int) -> None:
            params = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
            body = {"text": "a story", "sampling_params": params, "routed_dp_rank": rank}
            ended.put(httpx.post(f"{server.url}/generate", json=body, timeout=100))

        askers = [threading.Thread(target=ask, args=one) for one in ((1, 450), (0, 40))]
        askers[0].start()
        eventually(lambda: server.get("/v1/loads").json()["loads"][1]["num_running_reqs"] == 1)
        askers[1].start()
        os.kill(pids[3], signal.SIGKILL)
        found = sorted((ended.get(timeout=60) for _ in askers), key=lambda answer: answer.status_code)
        assert [answer.status_code for answer in found] == [200, 503], [answer.text for answer in found]
        text = found[1].text
        assert "data parallel rank 1 of 2 has gone" in text and "rank 1 of 2 has gone: its process" in text, text
        assert "SIGKILL" in text and found[1].headers["retry-after"]
        assert server.get("/health").status_code == 200
        eventually(lambda: "stale" not in server.get("/server_info").json()["internal_states"][1], 60)
        assert {server.generate("hello world", 24).json()["meta_info"]["dp_rank"] for _ in range(2)} == {0, 1}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert all(gone(pid) for pid in pids)
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")
def test_an_engine_in_this_process_has_replicas_beside_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 2048}
    ask = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    path, before = str(checkpoint("llama", tmp_path)), children_of(os.getpid())
    with Engine(model_path=path, **options) as one:
        expected: Any = one.generate("hello world", ask)
    with Engine(model_path=path, dp_size=2, load_balance_method="round_robin", **options) as engine:
        answers: Any = engine.generate(["hello world"] * 4, ask)
        assert [answer["output_ids"] for answer in answers] == [expected["output_ids"]] * 4
        assert [answer["meta_info"]["dp_rank"] for answer in answers] == [0, 1, 0, 1]
        assert expected["meta_info"]["dp_rank"] is None
        assert engine.flush_cache()
        states = engine.get_server_info()["internal_states"]
        assert [state["dp_rank"] for state in states] == [0, 1]
        pids = [pid for pid in children_of(os.getpid()) if pid not in before]
        assert len(pids) == 2
    eventually(lambda: all(gone(pid) for pid in pids), 10)
