"""Three servers and a gateway as processes: prompts by one and answers by another are what one server alone gives."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Server, eventually

from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.slow
OPTIONS = (
    "--dtype", "float32", "--threads", "1", "--max-total-tokens", "4096", "--ops", "invariant",
    "--chunked-prefill-size", "32", "--random-seed", "1", "--served-model-name", "tiny", "--debug-invariants",
)  # fmt: skip
rng = random.Random(1)


@dataclass
class Fleet:
    alone: Server
    prefill: Server
    decode: Server
    model: Path
    url: str  # of the gateway

    def differs(self, route: str, body: dict[str, Any]) -> str:
        """What the pair answers otherwise than one server; "": nothing."""
        one, two = (httpx.post(url + route, json=body, timeout=60) for url in (self.alone.url, self.url))
        assert one.status_code == two.status_code == 200, (one.text, two.text)
        if body.get("stream"):
            one, two = (
                "".join(event.get("choices", [{}])[0].get("text", "") for event in _events(x)) for x in (one, two)
            )
            return "" if one == two else f"{one!r} and {two!r}"
        found = [_kept(answer.json()) for answer in (one, two)]
        return "" if found[0] == found[1] else f"{found[0]} and {found[1]}"

    def update(self, server: Server, body: dict[str, Any]) -> None:
        answer = httpx.post(server.url + "/update_weights_from_disk", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["success"], answer.text

    def state(self, server: Server) -> dict[str, Any]:
        return server.get("/server_info").json()["internal_states"][0]["disaggregation"]


def _events(answer: httpx.Response) -> list[Any]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def _kept(answer: Any) -> Any:
    if isinstance(answer, list):
        return [_kept(item) for item in answer]
    if "choices" in answer:
        return answer["choices"], answer["usage"]
    meta = answer["meta_info"]
    logprobs = {name: value for name, value in meta.items() if "logprobs" in name}
    return answer["output_ids"], meta["finish_reason"], meta["prompt_tokens"], logprobs


def _pair(model: Path, port: int) -> tuple[Server, Server]:
    more = ("--disaggregation-bootstrap-port", str(port), "--disaggregation-mode")
    return Server(model, *OPTIONS, *more, "prefill"), Server(model, *OPTIONS, *more, "decode")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = tmp_path_factory.mktemp("pd")
    tiny_checkpoint("llama", model)
    port = 18_000 + os.getpid() % 10_000
    alone = Server(model, *OPTIONS)
    prefill, decode = _pair(model, port)
    for server in (alone, prefill, decode):
        server.wait_ready()
    where = ["--prefill", prefill.url, str(port), "--decode", decode.url]
    command = [sys.executable, "-m", "phloem", "router", "--port", str(port + 1), "--pd-disaggregation", *where]
    router = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url, end = f"http://127.0.0.1:{port + 1}", time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if httpx.get(url + "/workers").json()["stats"]["healthy_count"] == 2:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield Fleet(alone, prefill, decode, model, url)
    finally:
        router.terminate()
        for server in (alone, prefill, decode):
            server.process.terminate()
        for process in (router, alone.process, prefill.process, decode.process):
            process.wait(20)


# Gateways of others, as modules, that speak of pairs as SGLang does.
FOREIGN = {"sglang_router": ("sglang_router.launch_router",), "smg": ("smg", "launch")}


@contextlib.contextmanager
def foreign_gateway(name: str, fleet: Fleet) -> Iterator[str]:
    """In front of the pair; gives its address. Skips the test where it is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name.replace('_', '-')} is not installed")
    with socket.create_server(("127.0.0.1", 0)) as sock, socket.create_server(("127.0.0.1", 0)) as other:
        port, metrics = sock.getsockname()[1], other.getsockname()[1]
    bootstrap = fleet.prefill.get("/server_info").json()["disaggregation"]["bootstrap_port"]
    where = ["--prefill", fleet.prefill.url, str(bootstrap), "--decode", fleet.decode.url, "--pd-disaggregation"]
    ports = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
    process = subprocess.Popen(
        [sys.executable, "-m", *FOREIGN[name], *ports, *where, "--policy", "round_robin"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def serves() -> bool:
        try:
            body = {"text": "a", "sampling_params": {"max_new_tokens": 1}}
            return httpx.post(url + "/generate", json=body, timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    try:
        eventually(serves, 60)
        yield url
    finally:
        process.kill()  # smg waits up to three minutes for a request that `serves` has given up on
        process.wait(20)


@pytest.mark.parametrize("name", FOREIGN)
def test_gateways_of_others_serve_from_a_pair_what_one_server_answers(name: str, fleet: Fleet) -> None:
    with foreign_gateway(name, fleet) as url:
        before = fleet.state(fleet.decode)["rooms_fetched"]
        pair = Fleet(fleet.alone, fleet.prefill, fleet.decode, fleet.model, url)
        sampling = {"temperature": 0, "max_new_tokens": 12}
        for count in (3, 40, 100):
            assert not pair.differs("/generate", {"input_ids": ids(count), "sampling_params": sampling})
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello " * 20}], "temperature": 0}
        open_routes = [
            ("/v1/completions", {"model": "tiny", "prompt": "one two " * 9, "max_tokens": 8, "temperature": 0}),
            ("/v1/completions", {"model": "tiny", "prompt": "a b " * 9, "max_tokens": 8, "seed": 2, "stream": True}),
            ("/v1/chat/completions", chat | {"max_tokens": 8}),
        ]
        for route, body in open_routes:
            assert not pair.differs(route, body)
        assert fleet.state(fleet.decode)["rooms_fetched"] >= before + 6


def ids(count: int) -> list[int]:
    return [rng.randrange(3, 250) for _ in range(count)]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.9, "sampling_seed": 3, "top_p": 0.9},
        {"temperature": 0.7, "sampling_seed": 4, "frequency_penalty": 0.6, "repetition_penalty": 1.3},
        {"temperature": 0, "regex": "[a-c]{4,9}"},
        {"temperature": 0, "regex": "abcabcabc[a-c]{4,9}"},
        {"temperature": 0.8, "sampling_seed": 5, "n": 3},
        {"temperature": 0, "max_new_tokens": 1},
        {"temperature": 0, "max_new_tokens": 0},
    ],
    ids=str,
)
def test_generate_answers_as_one_server(fleet: Fleet, params: dict[str, Any]) -> None:
    for count in (5, 32, 333):
        body = {"input_ids": ids(count), "sampling_params": {"max_new_tokens": 12, "ignore_eos": True, **params}}
        # What a grammar forces, one server writes without drawing it: it has no logprobs there.
        wants = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 1} if "regex" not in params else {}
        assert fleet.differs("/generate", body | wants) == ""


def test_open_routes_batches_and_streams_answer_as_one_server(fleet: Fleet) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello there " * 9}], "max_tokens": 16}
    one, two = (httpx.post(url + "/v1/chat/completions", json=chat | {"seed": 3}, timeout=60).json()
                for url in (fleet.alone.url, fleet.url))  # fmt: skip
    assert one["choices"] == two["choices"] and one["usage"] == two["usage"]
    for body in (
        {"prompt": ["a b c d e f", "zz" * 40], "max_tokens": 9, "temperature": 0},
        {"prompt": "a b c d e f g h", "max_tokens": 5, "temperature": 0, "echo": True, "logprobs": 2},
        {"prompt": "q w e r t y " * 9, "max_tokens": 12, "temperature": 0, "stream": True},
    ):
        assert fleet.differs("/v1/completions", {"model": "tiny", **body}) == ""
    batch = {"input_ids": [ids(40), ids(70)], "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    assert fleet.differs("/generate", batch) == ""
    states = fleet.state(fleet.prefill), fleet.state(fleet.decode)
    assert states[0]["rooms_fetched"] == states[1]["rooms_fetched"] > 20
    assert states[0]["rooms_lost"] == states[1]["rooms_failed"] == 0


def test_messages_and_responses_answer_as_one_server(fleet: Fleet) -> None:
    """Decode is told of both, and of a response computes the prompt itself."""
    told, text = {"model": "tiny", "temperature": 0}, "hello there " * 9
    ask = told | {"max_tokens": 9, "messages": [{"role": "user", "content": text}]}
    before = fleet.state(fleet.decode)["rooms_fetched"]
    one, two = (httpx.post(url + "/v1/messages", json=ask, timeout=60).json() for url in (fleet.alone.url, fleet.url))
    assert one["content"] == two["content"] and one["stop_reason"] == two["stop_reason"] == "max_tokens"
    assert fleet.state(fleet.decode)["rooms_fetched"] == before + 1
    answers = [
        httpx.post(url + "/v1/responses", json=told | {"max_output_tokens": 9, "input": text}, timeout=60).json()
        for url in (fleet.alone.url, fleet.url)
    ]
    assert answers[0]["output"][0]["content"] == answers[1]["output"][0]["content"]
    more = told | {"max_output_tokens": 3, "input": "and?", "previous_response_id": answers[1]["id"]}
    assert httpx.post(fleet.url + "/v1/responses", json=more, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "bootstrap_room"),
        ({"bootstrap_room": 1}, "bootstrap_host"),
        ({"bootstrap_host": "a"}, "bootstrap_room"),
        ({"bootstrap_host": "a", "bootstrap_room": 2**63}, "bootstrap_room"),
        ({"bootstrap_host": "a", "bootstrap_room": [1, 2]}, "bootstrap_room"),
        ({"bootstrap_host": "a", "bootstrap_room": "1"}, "bootstrap_room"),
        ({"bootstrap_host": "a", "bootstrap_room": 1, "bootstrap_port": 0}, "bootstrap_port"),
        ({"bootstrap_host": 5, "bootstrap_room": 1}, "bootstrap_host"),
    ],
)
def test_a_request_that_says_no_meeting_place_is_refused(fleet: Fleet, body: dict[str, Any], field: str) -> None:
    answer = httpx.post(fleet.decode.url + "/generate", json={"input_ids": [5, 6, 7], **body}, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field


def test_warm_ups_without_a_peer_are_answered_and_a_server_of_both_takes_no_rooms(fleet: Fleet) -> None:
    body = {"input_ids": [5, 6, 7], "bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
    for server in (fleet.prefill, fleet.decode):
        assert httpx.post(server.url + "/generate", json=body, timeout=60).status_code == 200
    assert httpx.post(fleet.alone.url + "/generate", json=body, timeout=60).status_code == 400


@pytest.mark.parametrize(
    ("route", "prompt"),
    [
        ("/v1/completions", {"prompt": [7 + at % 90 for at in range(70)]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello there " * 9}]}),
    ],
)
def test_a_gateway_of_vllms_kind_asks_one_after_the_other(fleet: Fleet, route: str, prompt: dict[str, Any]) -> None:
    """Its parameters are handed from prefill's answer to decode's request, whole as they are."""
    body = {"model": "tiny", "temperature": 0.8, "seed": 5, "max_tokens": 12, **prompt}
    none = {"remote_engine_id": None, "remote_block_ids": None, "remote_host": None, "remote_port": None}
    asked = {"do_remote_decode": True, "do_remote_prefill": False, **none}
    before = fleet.state(fleet.decode)["rooms_fetched"]
    first = httpx.post(
        fleet.prefill.url + route, json=body | {"max_tokens": 1, "kv_transfer_params": asked}, timeout=60
    )
    assert first.status_code == 200, first.text
    told = first.json()["kv_transfer_params"]
    assert told["do_remote_prefill"] and not told["do_remote_decode"]
    second = httpx.post(fleet.decode.url + route, json=body | {"kv_transfer_params": told}, timeout=60)
    alone = httpx.post(fleet.alone.url + route, json=body | {"kv_transfer_params": {}}, timeout=60)
    assert second.json()["choices"] == alone.json()["choices"] and second.status_code == 200
    assert fleet.state(fleet.decode)["rooms_fetched"] == before + 1
    for server, wrong in (
        (fleet.decode, asked),
        (fleet.prefill, told),
        (fleet.alone, asked),
        (fleet.decode, told | {"remote_request_id": "x"}),
        (fleet.decode, told | {"do_remote_decode": True}),
        (fleet.prefill, asked | {"do_remote_decode": "x"}),
    ):
        answer = httpx.post(server.url + route, json=body | {"kv_transfer_params": wrong}, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "kv_transfer_params"


def test_servers_change_their_parts_when_nothing_runs(fleet: Fleet) -> None:
    def become(server: Server, mode: str) -> httpx.Response:
        return httpx.post(server.url + "/disaggregation_mode", json={"mode": mode}, timeout=60)

    assert become(fleet.alone, "prefill").status_code == become(fleet.decode, "both").status_code == 400
    body = {"model": "tiny", "prompt": ids(70), "temperature": 0, "max_tokens": 8}
    opened = httpx.post(
        fleet.prefill.url + "/v1/completions",
        json=body | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}, timeout=60,
    ).json()["kv_transfer_params"]  # fmt: skip
    assert "rooms" in become(fleet.prefill, "decode").text
    answer = httpx.post(fleet.decode.url + "/v1/completions", json=body | {"kv_transfer_params": opened}, timeout=60)
    assert answer.status_code == 200
    for prefill, decode in ((fleet.decode, fleet.prefill), (fleet.prefill, fleet.decode)):
        for server, mode in ((prefill, "null"), (decode, "null"), (prefill, "prefill"), (decode, "decode")):
            eventually(lambda server=server, mode=mode: become(server, mode).status_code == 200, 45)
            assert server.get("/server_info").json()["disaggregation_mode"] == mode
            if mode == "null":
                assert httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200
        asked = body | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        told = httpx.post(prefill.url + "/v1/completions", json=asked, timeout=60).json()["kv_transfer_params"]
        two = httpx.post(decode.url + "/v1/completions", json=body | {"kv_transfer_params": told}, timeout=60)
        one = httpx.post(fleet.alone.url + "/v1/completions", json=body, timeout=60)
        assert one.json()["choices"] == two.json()["choices"]
        assert fleet.state(decode)["rooms_fetched"] == 1 and fleet.state(decode)["mode"] == "decode"


def test_other_gateways_put_prompt_logprobs_together(fleet: Fleet) -> None:
    port = fleet.prefill.get("/server_info").json()["disaggregation"]["bootstrap_port"]
    body = {
        "input_ids": ids(50), "sampling_params": {"max_new_tokens": 4, "temperature": 0}, "return_logprob": True,
        "logprob_start_len": 0, "bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": 77,
    }  # fmt: skip
    answers: dict[str, Any] = {}

    def ask(server: Server, name: str) -> None:
        answers[name] = httpx.post(server.url + "/generate", json=body, timeout=60).json()["meta_info"]

    thread = threading.Thread(target=ask, args=(fleet.prefill, "prefill"))
    thread.start()
    ask(fleet.decode, "decode")
    thread.join()
    assert len(answers["prefill"]["input_token_logprobs"]) == 50 and answers["decode"]["input_token_logprobs"] == []


def test_new_weights_that_nobody_has_named_are_those_of_one_server_alone(fleet: Fleet, tmp_path: Path) -> None:
    """Both servers have changed theirs once, and call them what they did before."""
    body = {"input_ids": ids(60), "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    other, first = tiny_checkpoint("llama", tmp_path / "other", seed=9), fleet.model
    for server, path in ((fleet.prefill, other), (fleet.decode, first)):
        fleet.update(server, {"model_path": str(path)})
    failed = fleet.state(fleet.decode)["rooms_failed"]
    assert fleet.differs("/generate", body) == ""
    assert fleet.state(fleet.decode)["rooms_failed"] == failed + 1
    for server in (fleet.prefill, fleet.decode):
        fleet.update(server, {"model_path": str(first), "weight_version": "again"})
    fetched = fleet.state(fleet.decode)["rooms_fetched"]
    assert fleet.differs("/generate", body | {"input_ids": ids(60)}) == ""
    assert fleet.state(fleet.decode)["rooms_fetched"] == fetched + 1


def test_killed_in_the_middle_prefill_is_done_without(fleet: Fleet) -> None:
    prompts = [ids(480) for _ in range(4)]
    bodies = [{"input_ids": p, "sampling_params": {"max_new_tokens": 8, "temperature": 0}} for p in prompts]
    want = [httpx.post(fleet.alone.url + "/generate", json=body, timeout=60).json()["output_ids"] for body in bodies]
    found: dict[int, Any] = {}

    def ask(at: int) -> None:
        found[at] = httpx.post(fleet.url + "/generate", json=bodies[at], timeout=60).json()["output_ids"]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    engine = fleet.prefill.engine_pid()
    fleet.prefill.process.kill()
    os.kill(engine, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(4)] == want
    assert fleet.differs("/generate", bodies[0]) == ""
    state = fleet.state(fleet.decode)
    assert state["decode_transfer_queue_reqs"] == state["kv_row_bytes_held"] == 0
