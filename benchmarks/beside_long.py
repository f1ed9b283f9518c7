"""Streams beside long prompts on one real server: how far apart tokens come without them, with them, with a promise.

    python benchmarks/beside_long.py [MODEL] [--streams 4] [--long-rate 1] [--try=""] [--try="OPTIONS OF THE SERVER"]

The streams are those of the workload W3: 256 tokens in, 128 out. Phases of `--seconds` without and with long prompts
take turns. Without `--long-rate` one long prompt is in work all the time: the next is asked for when it has its first
token. With it they arrive in an open loop, whether the server keeps up or not. What a phase has begun is hung up on at
its end. Each `--try` is a server with these options; ALONE in them stands for the 99th percentile between tokens of
the first server's phases without long prompts, in whole milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

INPUT, OUTPUT = 256, 128
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


class Phase:
    """What was seen in all phases of one kind."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.firsts: list[float] = []
        self.long: list[float] = []  # times to the first token of long prompts that had one
        self.tokens = self.long_asked = 0
        self.seconds = 0.0

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "itl_ms": _of(self.gaps),
            "ttft_ms": _of(self.firsts),
            "output_tok_s": round(self.tokens / self.seconds, 1),
        }
        if self.long_asked:
            found |= {"long_asked": self.long_asked, "long_begun": len(self.long), "long_ttft_ms": _of(self.long)}
        return found


class Load:
    def __init__(self, url: str, streams: int, tokens: int, rate: float) -> None:
        self._url, self._streams, self._tokens, self._rate = url, streams, tokens, rate
        self._random = random.Random(1)
        self._client = httpx.AsyncClient(timeout=600, limits=LIMITS)

    async def ask(self, tokens: int, count: int) -> AsyncIterator[float]:
        """When each token came."""
        ids = [self._random.randrange(1000, 9000) for _ in range(tokens)]
        params = {"max_new_tokens": count, "ignore_eos": True, "temperature": 0}
        body: dict[str, Any] = {"input_ids": ids, "stream": True, "sampling_params": params}
        async with self._client.stream("POST", f"{self._url}/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    yield time.perf_counter()

    async def _one_after_the_other(self, phase: Phase) -> None:
        while True:
            last, first = time.perf_counter(), True
            async with contextlib.aclosing(self.ask(INPUT, OUTPUT)) as times:
                async for now in times:
                    (phase.firsts if first else phase.gaps).append(now - last)
                    last, first = now, False
                    phase.tokens += 1

    async def _long_one(self, phase: Phase) -> None:
        phase.long_asked += 1
        asked = time.perf_counter()
        async with contextlib.aclosing(self.ask(self._tokens, 1)) as times:
            async for now in times:
                phase.long.append(now - asked)

    async def _long(self, phase: Phase) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                one = group.create_task(self._long_one(phase))
                if self._rate:
                    await asyncio.sleep(1 / self._rate)
                else:
                    await one

    async def run(self, phase: Phase, seconds: float, long: bool) -> None:
        begun = time.perf_counter()
        work = [asyncio.ensure_future(self._one_after_the_other(phase)) for _ in range(self._streams)]
        work += [asyncio.ensure_future(self._long(phase))] if long else []
        ended, _ = await asyncio.wait(work, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for one in work:
            one.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        for one in ended:
            one.result()  # nothing ends by itself but by a fault
        phase.seconds += time.perf_counter() - begun

    async def both(self, seconds: float, turns: int) -> tuple[Phase, Phase]:
        without, beside = Phase(), Phase()
        for tokens in (INPUT, self._tokens):  # what is made at first use
            async with contextlib.aclosing(self.ask(tokens, 8)) as times:
                async for _ in times:
                    pass
        for _ in range(turns):
            await self.run(without, seconds, long=False)
            await asyncio.sleep(1.0)  # what was hung up on has ended
            await self.run(beside, seconds, long=True)
            await asyncio.sleep(1.0)
        return without, beside


def _of(seconds: list[float]) -> dict[str, float]:
    found = sorted(seconds)
    return {f"p{share}": round(1e3 * found[len(found) * share // 100], 1) for share in (50, 99)} if found else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--long-rate", type=float, default=0.0)
    parser.add_argument("--long-tokens", type=int, default=8000)
    parser.add_argument("--try", dest="tries", action="append")
    args = parser.parse_args()
    alone = 0.0
    for options in args.tries or [""]:
        process, url = start(args.model, *shlex.split(options.replace("ALONE", str(round(alone)))))
        try:
            load = Load(url, args.streams, args.long_tokens, args.long_rate)
            without, beside = (phase.told() for phase in asyncio.run(load.both(args.seconds, args.turns)))
        finally:
            process.terminate()
            process.wait(60)
        alone = alone or without["itl_ms"]["p99"]
        times = beside["itl_ms"]["p99"] / without["itl_ms"]["p99"]
        found = {"options": options, "streams": args.streams, "without": without, "beside": beside}
        print(json.dumps({**found, "itl_p99_times": round(times, 2)}), flush=True)


if __name__ == "__main__":
    main()
