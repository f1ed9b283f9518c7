"""Measure the gateway: what it adds to the first byte and what it costs, and how much of prompts it gets reused.

`cost` runs an open-loop load against servers without a model, directly and through the gateway in turns; `reuse` runs
conversations against real servers of one model, through one policy after the other. Servers and gateways are processes
of their own and are ended in every case.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from phloem.bench._http import Http, run
from phloem.bench._report import context, percentile, write_line
from phloem.cli._options import parse_own
from phloem.core.config import opt
from phloem.core.errors import BadRequest, PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

START_SECONDS = 120.0
PARTS = ("cost", "reuse")
POOL = 4096  # tokens of each server's cache in `reuse`


@dataclass(frozen=True)
class Options:
    parts: str = opt("cost,reuse", "What is measured: cost, reuse.")
    rate: float = opt(500.0, "cost: requests a second.")
    seconds: float = opt(8.0, "cost: how long each turn lasts.")
    turns: int = opt(2, "cost: turns of each, direct and through the gateway.")
    events: int = opt(16, "cost: events of each answer.")
    pause: float = opt(0.01, "cost: seconds between two events.")
    prompt_bytes: int = opt(2000, "cost: length of each prompt.")
    policy: str = opt("cache_aware", "cost: the policy.")
    workers: int = opt(2, "Servers.")
    policies: str = opt("round_robin,cache_aware", "reuse: the policies that are compared.")
    conversations: int = opt(24, "reuse: conversations at a time.")
    rounds: int = opt(5, "reuse: questions of each.")
    model: str | None = opt(None, "reuse: what is served; default: a tiny random model.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    options = parse_own("bench router", argv, Options, __doc__ or "")
    parts = [part for part in options.parts.split(",") if part]
    if strange := [part for part in parts if part not in PARTS]:
        raise BadRequest(f"parts: {strange[0]!r} is none of {', '.join(PARTS)}")
    if min(options.rate, options.seconds, options.turns, options.workers, options.conversations, options.rounds) <= 0:
        raise BadRequest("rate, seconds, turns, workers, conversations and rounds must be above 0")
    record: dict[str, Any] = {**context(), "options": vars(options)}
    with contextlib.ExitStack() as stack:
        if "cost" in parts:
            record["cost"] = _cost(stack, options)
        if "reuse" in parts:
            record["reuse"] = _reuse(stack, options)
    print(json.dumps({name: record[name] for name in parts}, indent=2))
    if options.output:
        write_line(Path(options.output), record)
    return 0


# processes


@contextlib.contextmanager
def _process(*args: str, pattern: str = r"(\d+)\s*$") -> Generator[tuple[int, int]]:
    """A Python module as a process that prints its port; gives the process id and the port."""
    process = subprocess.Popen([sys.executable, "-m", *args], stdout=subprocess.PIPE, text=True)
    try:
        yield process.pid, _port(process, args[0], pattern)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _port(process: subprocess.Popen[str], name: str, pattern: str) -> int:
    deadline = time.monotonic() + START_SECONDS
    assert process.stdout is not None
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        found = re.search(pattern, line)
        if found:
            return int(found[1])
        if not line and process.poll() is not None:
            break
    raise PhloemError(f"{name} did not start")


def _gateway(stack: contextlib.ExitStack, ports: list[int], policy: str) -> tuple[int, int]:
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    args = [
        "phloem",
        "router",
        "--port",
        "0",
        "--log-level",
        "warning",
        "--policy",
        policy,
        "--worker-urls",
        *urls,
    ]
    found = stack.enter_context(_process(*args))
    run(_until_well(found[1], len(ports)))
    return found


async def _until_well(port: int, count: int) -> None:
    http, deadline = Http(f"http://127.0.0.1:{port}", {}), time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            answer = await http.exchange("GET", "/health")
            if answer.status == 200 and json.loads(answer.body).get("ready") == count:
                http.close()
                return
        await asyncio.sleep(0.1)
    raise PhloemError("the gateway found its servers not well")


# what it costs


def _cost(stack: contextlib.ExitStack, options: Options) -> dict[str, Any]:
    """Times to the first byte in ms, and the gateway's share of one core, its start left out."""
    paced = [str(options.events), str(options.pause)]
    ports = [stack.enter_context(_process("phloem.bench._paced", "0", *paced))[1] for _ in range(options.workers)]
    pid, port = _gateway(stack, ports, options.policy)
    process, found = psutil.Process(pid), dict[str, list[float]](direct=[], gateway=[])
    failed, cpu, wall = 0, 0.0, 0.0
    run(_load([port], options, 1.0))  # connections are opened, code is warm
    for _ in range(options.turns):
        times, _ = run(_load(ports, options, options.seconds))
        found["direct"] += times
        before, begun = sum(process.cpu_times()[:2]), time.monotonic()
        times, lost = run(_load([port], options, options.seconds))
        cpu, wall = cpu + sum(process.cpu_times()[:2]) - before, wall + time.monotonic() - begun
        found["gateway"] += times
        failed += lost
    record: dict[str, Any] = {
        name: {f"p{int(share * 100)}": round(percentile(times, share) * 1e3, 3) for share in (0.5, 0.9, 0.99)}
        for name, times in found.items()
    }
    requests = len(found["gateway"])
    return {
        **record,
        "added_p50_ms": round(record["gateway"]["p50"] - record["direct"]["p50"], 3),
        "added_p99_ms": round(record["gateway"]["p99"] - record["direct"]["p99"], 3),
        "requests_per_s": round(requests / wall, 1),
        "events_per_s": round(requests * options.events / wall),
        "core_share": round(cpu / wall, 3),
        "cpu_us_per_request": round(cpu / max(requests, 1) * 1e6),
        "memory_mb": round(process.memory_info().rss / 2**20),
        "failed": failed,
    }


async def _load(ports: list[int], options: Options, seconds: float) -> tuple[list[float], int]:
    """Arrivals at random with a steady rate; gives seconds to first bytes and how many failed."""
    doors = [Http(f"http://127.0.0.1:{port}", {}) for port in ports]
    rng, loop = random.Random(7), asyncio.get_running_loop()
    times, failed = list[float](), 0

    async def one(at: int) -> None:
        nonlocal failed
        text = f"{at % 50:08d} " + "word " * (options.prompt_bytes // 5)
        body = {"model": "paced", "stream": True, "max_tokens": options.events,
                "messages": [{"role": "user", "content": text}]}  # fmt: skip
        begun = time.perf_counter()
        try:
            answer = await doors[at % len(doors)].exchange("POST", "/v1/chat/completions", body)
        except (OSError, ValueError):
            failed += 1
            return
        if answer.status != 200 or not answer.body.endswith(b"[DONE]\n\n"):
            failed += 1
            return
        times.append(answer.pieces[0][0] - begun)

    tasks: list[asyncio.Task[None]] = []
    begun, due, at = loop.time(), 0.0, 0
    while due < seconds:
        await asyncio.sleep(max(0.0, begun + due - loop.time()))
        tasks.append(asyncio.create_task(one(at)))
        at += 1
        due += rng.expovariate(options.rate)
    await asyncio.gather(*tasks)
    for door in doors:
        door.close()
    return times, failed


# what it gets reused


def _reuse(stack: contextlib.ExitStack, options: Options) -> dict[str, Any]:
    """Of each policy: the share of prompt tokens that servers had cached, by their own count."""
    model = options.model
    if model is None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = str(tiny_checkpoint("llama", Path(folder) / "tiny", max_position_embeddings=8192))
    ports: list[int] = []
    for _ in range(options.workers):
        events = json.dumps({"endpoint": "tcp://127.0.0.1:*", "bind": True, "replay_endpoint": None})
        args = ["phloem", "serve", model, "--port", "0", "--log-level", "warning", "--served-model-name", "served",
                "--max-total-tokens", str(POOL), "--threads", "1", "--kv-events-config", events]  # fmt: skip
        ports.append(stack.enter_context(_process(*args, pattern=r"http://[^:]+:(\d+)"))[1])
    found: dict[str, Any] = {}
    for policy in options.policies.split(","):
        with contextlib.ExitStack() as inner:
            _, port = _gateway(inner, ports, policy)
            found[policy] = run(_talk(port, options))
    return found


async def _talk(port: int, options: Options) -> dict[str, Any]:
    """Conversations that take turns, each longer than the one before; a question waits for its answer."""
    http, rng = Http(f"http://127.0.0.1:{port}", {}), random.Random(11)
    await http.exchange("POST", "/flush_cache")
    prompt = cached = failed = 0
    firsts: list[float] = []

    async def talk(at: int) -> None:
        nonlocal prompt, cached, failed
        words = random.Random(at)
        text = f"conversation {at}. " + " ".join(str(words.randrange(1000)) for _ in range(40))
        messages: list[dict[str, str]] = [{"role": "user", "content": text}]
        for _ in range(options.rounds):
            await asyncio.sleep(rng.random() * 0.2)
            body = {"model": "served", "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            begun = time.perf_counter()
            answer = await http.exchange("POST", "/v1/chat/completions", body)
            if answer.status != 200:
                failed += 1
                return
            firsts.append(time.perf_counter() - begun)
            told = json.loads(answer.body)
            prompt += told["usage"]["prompt_tokens"]
            cached += (told["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            messages += [
                {"role": "assistant", "content": told["choices"][0]["message"]["content"] or ""},
                {"role": "user", "content": " ".join(str(words.randrange(1000)) for _ in range(20))},
            ]

    await asyncio.gather(*(talk(at) for at in range(options.conversations)))
    http.close()
    return {
        "reuse": round(cached / max(prompt, 1), 3),
        "prompt_tokens": prompt,
        "mean_ms": round(sum(firsts) / max(len(firsts), 1) * 1e3, 1),
        "failed": failed,
    }
