"""A cold start in a process of its own, for scripts/gpu_check.py: ready, and the first requests against later ones.

    python scripts/gpu_cold.py CONFIG.json [--requests 96] [--flight 32] [--prompt 512] [--output 128] [--rounds 2]

The engine of `phloem.Engine` serves random weights in the shapes of a config.json; prompts have odd lengths, no two
alike. One JSON object goes to standard output. Kernels are kept below XDG_CACHE_HOME: a new directory there is a start
without any cache, the same directory once more one with it.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))


async def _one(engine: Any, ids: list[int], output: int) -> tuple[float, float, int]:
    """(Seconds to the first token, longest gap between two, tokens)."""
    params = {"temperature": 0.0, "max_new_tokens": output, "ignore_eos": True}
    begun = last = time.perf_counter()
    first, gap, tokens = 0.0, 0.0, 0
    async for answer in await engine.async_generate(input_ids=ids, sampling_params=params, stream=True):
        now = time.perf_counter()
        if tokens == 0:
            first = now - begun
        else:
            gap = max(gap, now - last)
        last, tokens = now, int(answer["meta_info"]["completion_tokens"])
    return first, gap, tokens


async def _round(engine: Any, args: argparse.Namespace, vocab: int, seed: int) -> dict[str, Any]:
    """All requests, so many in flight."""
    draw = random.Random(seed)
    gate = asyncio.Semaphore(args.flight)
    lengths = [max(1, args.prompt - draw.randrange(max(1, args.prompt // 4))) for _ in range(args.requests)]

    async def run(length: int) -> tuple[float, float, int]:
        ids = [draw.randrange(vocab) for _ in range(length)]
        async with gate:
            return await _one(engine, ids, args.output)

    begun = time.perf_counter()
    found = await asyncio.gather(*(run(length) for length in lengths))
    wall = time.perf_counter() - begun
    firsts = sorted(first for first, _, _ in found)
    return {
        "output_tok_per_s": sum(tokens for _, _, tokens in found) / wall,
        "ttft_ms_mean": 1e3 * sum(firsts) / len(firsts),
        "ttft_ms_max": 1e3 * firsts[-1],
        "longest_gap_ms": 1e3 * max(gap for _, gap, _ in found),
        "wall_s": wall,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start, serve the rounds, and tell what the engine says of its kernels and graphs."""
    begun = time.perf_counter()
    from phloem import Engine

    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    if args.device:
        settings["device"] = args.device
    with Engine(model_path=str(args.config), **settings) as engine:
        ready = time.perf_counter() - begun
        info = engine.get_server_info()
        vocab = int(info["vocab_size"])

        async def rounds() -> list[dict[str, Any]]:
            return [await _round(engine, args, vocab, seed) for seed in range(args.rounds)]

        served = asyncio.run(rounds())
        after = engine.get_server_info()
    rates = [row["output_tok_per_s"] for row in served]
    return {
        "ready_s": ready,
        "phases": info.get("phases"),
        "kernels": after["internal_states"][0]["prepared"].get("kernels"),
        "graphs": info["prepared"]["graphs"],
        "rounds": served,
        "cold_over_warm": rates[0] / max(rates[1:], default=rates[0]),
    }


def main() -> int:
    faulthandler.register(signal.SIGUSR1)  # where it stands, if it has to be ended
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    for name, value in (("requests", 96), ("flight", 32), ("prompt", 512), ("output", 128), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="")
    args = parser.parse_args()
    sys.stdout.write(json.dumps(measure(args)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
