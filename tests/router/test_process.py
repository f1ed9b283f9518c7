"""The gateway and its servers as processes: killed, ended, started again, measured."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from gateway import gateway

from phloem.bench import router as bench

pytestmark = pytest.mark.slow


@contextmanager
def process(*args: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    started = subprocess.Popen([sys.executable, "-m", *args], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    try:
        found = re.search(r"(\d+)\s*$", started.stdout.readline())
        assert found
        yield started, int(found[1])
    finally:
        started.kill()
        started.wait()


def paced(events: int = 20, pause: float = 0.02) -> Any:
    return process("phloem.bench._paced", "0", str(events), str(pause))


async def test_kill_9_of_a_server_under_load_leaves_nobody_hanging() -> None:
    with paced() as (first, one), paced() as (_, other):
        urls = (f"http://127.0.0.1:{one}", f"http://127.0.0.1:{other}")
        async with gateway(worker_urls=urls) as gate:
            ends: list[str] = []

            async def ask(at: int) -> None:
                await asyncio.sleep(at * 0.01)
                answer = await gate.chat(stream=True, model="paced")
                blocks = answer.text.split("\n\n")
                told = [json.loads(block[6:]).get("error") for block in blocks if block.startswith("data: {")]
                ends.append("broken" if told[-1] else "whole" if len(told) == 20 else "short")
                if told[-1]:
                    assert told[-1]["retryable"] is True and "broke off" in told[-1]["message"]
                assert blocks[-2] == "data: [DONE]"

            async def kill() -> None:
                await asyncio.sleep(0.3)
                os.kill(first.pid, signal.SIGKILL)

            await asyncio.wait_for(asyncio.gather(kill(), *(ask(at) for at in range(100))), 30)
            assert ends.count("whole") + ends.count("broken") == 100 and 1 <= ends.count("broken") < 50
            gate.idle()


async def test_sigterm_lets_streams_end_and_the_next_gateway_serves_at_once() -> None:
    with paced(40) as (_, port):
        args = ("phloem", "router", "--port", "0", "--worker-urls", f"http://127.0.0.1:{port}", "--log-level", "error")
        for _ in range(2):
            with process(*args) as (gate, at):
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{at}", timeout=20) as http:
                    async with http.stream("POST", "/v1/chat/completions", json={"stream": True}) as answer:
                        parts = answer.aiter_text()
                        text = await anext(parts)
                        gate.send_signal(signal.SIGTERM)
                        text += "".join([part async for part in parts])
                    assert text.count("chat.completion.chunk") == 40 and text.endswith("[DONE]\n\n")
                assert await asyncio.to_thread(gate.wait, 20) == 0


def test_a_gateway_says_that_it_routes_when_servers_were_asked_whether_or_not_they_answer() -> None:
    with paced() as (_, port), socket.create_server(("127.0.0.1", 0)) as silent:
        urls = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{silent.getsockname()[1]}"
        with process("phloem", "router", "--port", "0", "--worker-urls", *urls, "--log-level", "error") as (_, at):
            body = {"messages": [{"role": "user", "content": "x"}]}
            answer = httpx.post(f"http://127.0.0.1:{at}/v1/chat/completions", json=body, timeout=20)
    assert answer.status_code == 200, answer.text


def test_the_benchmark_measures_and_conversations_are_reused_where_they_were(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two real servers of a tiny model, whose cache events the gateway follows."""
    quick = ["--rate", "50", "--seconds", "1", "--turns", "1", "--conversations", "8", "--rounds", "4"]
    assert bench.main(quick) == 0
    told = json.loads(capsys.readouterr().out)
    cost, reuse = told["cost"], told["reuse"]
    assert cost["failed"] == 0 and cost["requests_per_s"] > 0
    assert reuse["round_robin"]["failed"] == reuse["cache_aware"]["failed"] == 0
    assert reuse["cache_aware"]["reuse"] > reuse["round_robin"]["reuse"]
