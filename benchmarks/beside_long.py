"""Streams beside long prompts on one real server: how far apart tokens come without them, with them, with a promise.

    python benchmarks/beside_long.py [MODEL] [--long-rate 1] [--long-tokens 8000] [--slo '{"itl_ms": 200}']

The streams are those of the workload W3: 256 tokens in, 128 out, 32 in flight. Long prompts arrive in an open loop
while any stream runs, whether the server keeps up or not; those that are left when the streams end are hung up on.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import subprocess
import sys
import time
from typing import Any

import httpx

INPUT, OUTPUT, IN_FLIGHT = 256, 128, 32
LIMITS = httpx.Limits(max_connections=1000)


def start(model: str, *more: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "phloem", "serve", model, "--port", "0", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"at (http://127\.0\.0\.1:\d+)$", line.strip()):
            return process, found[1]
    raise SystemExit("the server did not start:\n" + "".join(lines))


class Load:
    def __init__(self, url: str) -> None:
        self._url, self._random = url, random.Random(1)
        self._client = httpx.AsyncClient(timeout=600, limits=LIMITS)
        self.gaps: list[float] = []
        self.firsts: list[float] = []
        self.long: list[float] = []  # times to the first token of long prompts that had one
        self.begun = 0  # long prompts

    async def ask(self, tokens: int, count: int) -> list[float]:
        """When each token came, behind when it was asked for."""
        times = [time.perf_counter()]
        ids = [self._random.randrange(1000, 9000) for _ in range(tokens)]
        params = {"max_new_tokens": count, "ignore_eos": True, "temperature": 0}
        body: dict[str, Any] = {"input_ids": ids, "stream": True, "sampling_params": params}
        async with self._client.stream("POST", f"{self._url}/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        return times

    async def streams(self, requests: int) -> None:
        left = iter(range(requests))

        async def one_after_the_other() -> None:
            for _ in left:
                asked, *times = await self.ask(INPUT, OUTPUT)
                self.firsts.append(times[0] - asked)
                self.gaps += [b - a for a, b in itertools.pairwise(times)]

        await asyncio.gather(*(one_after_the_other() for _ in range(IN_FLIGHT)))

    async def long_one(self, tokens: int) -> None:
        self.begun += 1
        asked, first = await self.ask(tokens, 1)
        self.long.append(first - asked)

    async def run(self, requests: int, rate: float, tokens: int) -> dict[str, Any]:
        await self.ask(INPUT, 8)  # what is made at first use
        begun = time.perf_counter()
        streams = asyncio.ensure_future(self.streams(requests))
        asked: list[asyncio.Future[None]] = []
        while rate and not streams.done():
            asked.append(asyncio.ensure_future(self.long_one(tokens)))
            await asyncio.wait([streams], timeout=max(0.0, begun + len(asked) / rate - time.perf_counter()))
        await streams
        seconds = time.perf_counter() - begun
        for one in asked:
            one.cancel()
        ended = await asyncio.gather(*asked, return_exceptions=True)
        if wrong := [one for one in ended if isinstance(one, Exception)]:
            raise wrong[0]
        return {
            "itl_ms": _of(self.gaps),
            "ttft_ms": _of(self.firsts),
            "output_tok_s": round(requests * OUTPUT / seconds, 1),
            "long_asked": self.begun,
            "long_begun": len(self.long),
            "long_ttft_ms": _of(self.long),
        }


def _of(seconds: list[float]) -> dict[str, float]:
    found = sorted(seconds)
    return {f"p{share}": round(1e3 * found[len(found) * share // 100], 1) for share in (50, 99)} if found else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--long-rate", type=float, default=0.0)
    parser.add_argument("--long-tokens", type=int, default=8000)
    parser.add_argument("--slo")
    args, more = parser.parse_known_args()
    promise = ["--schedule-policy", "deadline", "--slo", args.slo] if args.slo else []
    process, url = start(args.model, *promise, *more)
    try:
        found = asyncio.run(Load(url).run(args.requests, args.long_rate, args.long_tokens))
    finally:
        process.terminate()
        process.wait(60)
    print(json.dumps({"long_rate": args.long_rate, "slo": args.slo, **found}))


if __name__ == "__main__":
    main()
