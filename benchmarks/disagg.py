"""Long prompts beside steady streams: one engine, against a prefill and a decode server on one machine.

    python benchmarks/disagg.py MODEL [--seconds 20] [--prompt 1024] [--layouts one,one-core,pair,pair-shared,...]

Streams decode all the time while a long prompt comes every `--every` seconds; told are the time to its first token and
the gaps between the streams' tokens. `LAYOUTS` says which servers run where: the one engine has both cores, and once
one; servers of the pair have a core each, or share both, as the system lets them or with one behind the other.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from typing import Any

import httpx

# Of each server: what it does, how many of the two cores it may run on, and how far it stands back (`nice`).
LAYOUTS: dict[str, list[tuple[str, str, int]]] = {
    "one": [("", "both", 0)],
    "one-core": [("", "first", 0)],
    "pair": [("prefill", "first", 0), ("decode", "last", 0)],
    "pair-shared": [("prefill", "both", 0), ("decode", "both", 0)],
    "pair-behind": [("prefill", "both", 10), ("decode", "both", 0)],
    "pair-ahead": [("prefill", "both", 0), ("decode", "both", 10)],
    "pair-wide": [("prefill", "both", 10), ("decode", "last", 0)],
}
COMMON = ["--max-total-tokens", "24576", "--dtype", "float32", "--speculative-algorithm", "none"]


def start(model: str, cores: str, behind: int, *more: str) -> tuple[subprocess.Popen[str], str]:
    threads = str(len(cores.split(",")))
    command = [
        "nice",
        "-n",
        str(behind),
        "taskset",
        "-c",
        cores,
        sys.executable,
        "-m",
        "phloem",
        "serve",
        model,
        "--port",
        "0",
        "--threads",
        threads,
    ]
    process = subprocess.Popen([*command, *COMMON, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"at (http://127\.0\.0\.1:\d+)$", line.strip()):
            return process, found[1]
    raise SystemExit("a server did not start")


class Fleet:
    """`urls`: one server, or prefill and decode."""

    def __init__(self, urls: list[str], port: int) -> None:
        self.urls, self.port = urls, port
        self.client = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=100))

    async def stream(self, ids: list[int], count: int, times: list[float]) -> None:
        body: dict[str, Any] = {"input_ids": ids, "stream": True}
        body["sampling_params"] = {"max_new_tokens": count, "ignore_eos": True, "temperature": 0}
        half = None
        if len(self.urls) == 2:
            body |= {
                "bootstrap_host": "127.0.0.1",
                "bootstrap_port": self.port,
                "bootstrap_room": random.getrandbits(62),
            }
            half = asyncio.ensure_future(self.client.post(self.urls[0] + "/generate", json=body))
        async with self.client.stream("POST", self.urls[-1] + "/generate", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        if half is not None:
            await half


async def measure(fleet: Fleet, seconds: float, prompt: int, every: float, streams: int) -> dict[str, Any]:
    rng, gaps, firsts = random.Random(1), list[float](), list[float]()
    end = time.perf_counter() + seconds

    async def steady() -> None:
        while time.perf_counter() < end:
            times: list[float] = []
            await fleet.stream([rng.randrange(1000, 9000) for _ in range(16)], 128, times)
            gaps.extend(b - a for a, b in itertools.pairwise(times))

    async def one() -> None:
        begun, times = time.perf_counter(), list[float]()
        await fleet.stream([rng.randrange(1000, 9000) for _ in range(prompt)], 2, times)
        firsts.append(times[0] - begun)

    await fleet.stream([rng.randrange(1000, 9000) for _ in range(prompt)], 4, [])
    tasks = [asyncio.ensure_future(steady()) for _ in range(streams)]
    while time.perf_counter() < end - every:
        await asyncio.sleep(every)
        tasks.append(asyncio.ensure_future(one()))
    await asyncio.gather(*tasks)
    gaps.sort()
    firsts.sort()
    return {
        "ttft_p50_ms": round(firsts[len(firsts) // 2] * 1e3, 1),
        "ttft_max_ms": round(firsts[-1] * 1e3, 1),
        "itl_p50_ms": round(gaps[len(gaps) // 2] * 1e3, 2),
        "itl_p99_ms": round(gaps[int(len(gaps) * 0.99)] * 1e3, 2),
        "stream_tokens_per_s": round(len(gaps) / seconds, 1),
        "prompts": len(firsts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--every", type=float, default=3.0)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--backend", default="shm")
    parser.add_argument("--layouts", default="one,one-core,pair", help="some of " + ", ".join(LAYOUTS))
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    where = {"both": ",".join(map(str, cores)), "first": str(cores[0]), "last": str(cores[-1])}
    port = 18998
    split = ["--disaggregation-bootstrap-port", str(port), "--disaggregation-transfer-backend", args.backend]
    split.append("--disaggregation-mode")
    for name in args.layouts.split(","):
        running = [
            start(args.model, where[place], behind, *([*split, mode] if mode else []))
            for mode, place, behind in LAYOUTS[name]
        ]
        try:
            fleet = Fleet([url for _, url in running], port)
            found = asyncio.run(measure(fleet, args.seconds, args.prompt, args.every, args.streams))
            if len(running) == 2:
                state = httpx.get(running[0][1] + "/server_info").json()["internal_states"][0]["disaggregation"]
                found |= {key: state[key] for key in ("rooms_fetched", "kv_transfer_bytes", "kv_transfer_speed_gb_s")}
            print(json.dumps({"layout": name, "backend": args.backend, **found}), flush=True)
        finally:
            for process, _ in running:
                process.terminate()
            for process, _ in running:
                process.wait(30)


if __name__ == "__main__":
    main()
