"""Whole servers as processes: start, serve, drain, die. A tiny model with random weights stands for a real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from model_support import edited
from served import Server, eventually, gone

from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    found = Server(
        model, "--dtype", "float32", "--max-total-tokens", "16384", "--max-running-requests", "48", "--debug-invariants"
    )
    try:
        yield found.wait_ready()
    finally:
        found.close()


def test_decisions_phases_and_readiness_are_printed(server: Server) -> None:
    text = "\n".join(server.lines)
    for word in ("max_total_num_tokens", "attention_backend", "context_length", "ready after", "weights", "imports"):
        assert word in text
    info = server.get("/server_info").json()
    assert info["max_total_num_tokens"] == 16384 and info["decisions"]


async def _client(
    http: httpx.AsyncClient, url: str, number: int, leaves: bool, clock: random.Random
) -> tuple[int, str] | None:
    wanted = clock.randint(8, 24)
    body = {
        "text": f"client {number} says hello and waits for an answer " * clock.randint(1, 6),
        "sampling_params": {"max_new_tokens": wanted, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    last: dict[str, Any] = {}
    async with http.stream("POST", f"{url}/generate", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                last = json.loads(line[6:])
                if leaves:  # at the first event: a busy server may send all the others as one
                    return None
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": wanted}
    assert len(last["output_ids"]) == wanted
    return wanted, last["text"]


def resident(pid: int) -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def test_two_hundred_clients_of_whom_a_quarter_leaves(server: Server) -> None:
    """Nothing leaks over three rounds, and everybody who stays gets the whole answer."""
    engine = server.engine_pid()

    async def a_round(seed: int) -> int:
        clock = random.Random(seed)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=300, limits=limits) as http:
            jobs = [_client(http, server.url, i, i % 4 == 0, clock) for i in range(200)]
            return sum(1 for answer in await asyncio.gather(*jobs) if answer is not None)

    sizes: list[tuple[int, int]] = []
    for seed in range(3):
        assert asyncio.run(a_round(seed)) == 150
        eventually(lambda: server.state()["running"] + server.state()["waiting"] == 0)
        assert server.get("/flush_cache").status_code == 200
        assert server.state()["available_tokens"] == server.state()["total_tokens"]
        sizes.append((resident(server.process.pid), resident(engine)))
    for before, after in zip(sizes[1], sizes[2], strict=True):
        assert after < before * 1.1 + 8192, f"resident memory grew: {sizes} kB"


def test_a_taken_port_is_told_before_anything_is_loaded(server: Server, model: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "phloem", "serve", str(model), "--port", str(server.port)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "in use" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - begun < 30


def test_sigterm_lets_running_requests_finish_and_leaves_nothing(model: Path) -> None:
    server = Server(model, "--dtype", "float32", "--max-total-tokens", "8192").wait_ready()
    try:
        engine = server.engine_pid()
        answers: queue.SimpleQueue[httpx.Response] = queue.SimpleQueue()
        asker = threading.Thread(target=lambda: answers.put(server.generate("a long story", 600)))
        asker.start()
        eventually(lambda: server.state()["running"] == 1)
        server.process.send_signal(signal.SIGTERM)
        asker.join(60)
        answer = answers.get(timeout=1)
        assert answer.status_code == 200 and len(answer.json()["output_ids"]) == 600
        assert server.process.wait(30) == 0
        assert gone(engine)
        assert "Traceback" not in "\n".join(server.lines)
    finally:
        server.close()


def test_a_dead_engine_is_told_and_started_again(model: Path) -> None:
    server = Server(model, "--dtype", "float32", "--max-total-tokens", "8192").wait_ready()
    try:
        answers: queue.SimpleQueue[httpx.Response] = queue.SimpleQueue()
        asker = threading.Thread(target=lambda: answers.put(server.generate("a long story", 1500)))
        asker.start()
        eventually(lambda: server.state()["running"] == 1)
        first = server.engine_pid()
        os.kill(first, signal.SIGKILL)
        asker.join(60)
        answer = answers.get(timeout=1)
        assert answer.status_code == 503 and "SIGKILL" in answer.text
        assert server.get("/health").status_code == 503
        eventually(lambda: server.get("/health").status_code == 200, 60)
        assert server.engine_pid() != first
        assert server.generate("hello").status_code == 200
    finally:
        server.close()


def test_a_hung_engine_is_ended_and_started_again(model: Path) -> None:
    options = ("--watchdog-timeout", "1", "--engine-hang-timeout", "6")
    server = Server(model, "--dtype", "float32", "--max-total-tokens", "8192", *options).wait_ready()
    try:
        assert server.generate("hello").status_code == 200
        answers: queue.SimpleQueue[httpx.Response] = queue.SimpleQueue()
        askers = [threading.Thread(target=lambda: answers.put(server.generate("a story", 1500))) for _ in range(3)]
        for asker in askers:
            asker.start()
        eventually(lambda: server.state()["running"] == 3)
        first, stopped = server.engine_pid(), time.monotonic()
        os.kill(first, signal.SIGSTOP)
        late = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "stream": True}, timeout=60)
        assert late.status_code == 503, "one that came while it hung is answered too"
        for asker in askers:
            asker.join(60)
            answer = answers.get(timeout=1)
            assert answer.status_code == 503 and "hung" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"]
        assert 5 < time.monotonic() - stopped < 20
        eventually(lambda: server.get("/health").status_code == 200, 60)
        assert server.engine_pid() != first and gone(first)
        assert server.generate("hello").status_code == 200
        (line,) = [line for line in server.lines if "has been hanging" in line]
        assert "ERROR" in line
    finally:
        server.close()


def test_a_door_that_slept_with_its_engine_ends_nothing(model: Path) -> None:
    """Ctrl-Z and fg: both stop, both go on."""
    server = Server(
        model, "--dtype", "float32", "--max-total-tokens", "8192", "--engine-hang-timeout", "2"
    ).wait_ready()
    try:
        both = (server.engine_pid(), server.process.pid)
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        for pid in reversed(both):  # the door first
            os.kill(pid, signal.SIGCONT)
        time.sleep(3)
        assert server.engine_pid() == both[0] and server.generate("hello").status_code == 200
        assert not any("hanging" in line for line in server.lines)
    finally:
        server.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_behind_standard_output_stops_no_server(model: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "phloem", "serve", str(model), "--port", str(port), "--max-total-tokens", "4096"]
    with Path("/dev/full").open("w") as out:
        process = subprocess.Popen([*command, "--greet"], stdout=out, stderr=subprocess.PIPE, text=True)
    try:

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
            return False

        eventually(answers, 120)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert errors.count("standard output cannot be written to") == 1
    assert "Traceback" not in errors and "Exception ignored" not in errors


def test_a_dead_engine_ends_the_server_where_that_is_wanted(model: Path) -> None:
    server = Server(model, "--dtype", "float32", "--max-total-tokens", "8192", "--on-engine-death", "exit").wait_ready()
    try:
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.process.wait(30) == 1
    finally:
        server.close()


def test_a_killed_server_leaves_no_process_and_frees_its_port(model: Path) -> None:
    server = Server(model, "--dtype", "float32", "--max-total-tokens", "8192").wait_ready()
    engine, port = server.engine_pid(), server.port
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
    eventually(lambda: gone(engine), 10)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prot", "1"], "--port"),
        (["--schedule-policy", "lmp"], "lpm"),
        (["--context-length", "100000000"], "context_length"),
        (["--kv-memory", "1KiB"], "KV pool"),
        (["--attention-backend", "cpuu"], "cpu"),
        (["--model-path", "/nowhere/at/all"], "nowhere"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_wrong_options_end_with_a_clear_line_and_no_trace(model: Path, arguments: list[str], text: str) -> None:
    command = [sys.executable, "-m", "phloem", "serve", "--port", "0", "--model-path", str(model), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert text in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "config", "text"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, {}, "1 tensors are missing: model.layers.1.mlp.up_proj.weight"),
        ({"model.layers.1.mlp.more.weight": 1.0}, {}, "read by no layer of llama: model.layers.1.mlp.more.weight"),
        ({}, {"intermediate_size": 96}, "tensors have another shape"),
        ({}, {"quantization_config": {"quant_method": "own"}}, "'own' is not supported; read are auto-round, awq"),
        ({}, {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "--trust-remote-code"),
    ],
)
def test_checkpoints_that_cannot_be_served_end_before_a_port_is_open(
    model: Path, tmp_path: Path, change: dict[str, Any], config: dict[str, Any], text: str
) -> None:
    import torch

    def changed(stored: dict[str, Any]) -> dict[str, Any]:
        more = {name: torch.full((2,), value) for name, value in change.items() if value is not None}
        return {**{name: tensor for name, tensor in stored.items() if name not in change}, **more}

    broken = edited(model, tmp_path / "x", changed, **config)
    for file in model.glob("tokenizer*"):
        (broken / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "phloem", "serve", "--port", "0", "--model-path", str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = done.stderr + done.stdout
    assert done.returncode != 0 and text in said
    assert "http://127.0.0.1" not in said and "Traceback" not in said
