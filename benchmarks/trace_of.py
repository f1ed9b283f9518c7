"""Conversations as a trace file of Mooncake's form, for simulators of different makes: each line one request.

    python benchmarks/trace_of.py FILE [--workload conversation] [--rate 24] [--seconds 300] [--seed 0]

The requests are those that `phloem bench simulate --workload` draws; the next turn of a conversation comes a fixed time
for each token of the answer, and the drawn pause, after the one before. `hash_ids` stand for 512 tokens and all before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from phloem.simulation.traces import BLOCK, MIXES, conversations

SECONDS_A_TOKEN = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workload", default="conversation", choices=MIXES)
    parser.add_argument("--rate", type=float, default=24.0)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    known: dict[tuple[int, bytes], int] = {}
    found: list[dict[str, Any]] = []
    for one in conversations(MIXES[args.workload], args.rate, args.seconds, args.seed):
        now, pause = one.start, 0.0
        while pause is not None:
            output = one.output
            prompt, _ = one.take(args.seed, args.context)
            ids, above = list[int](), -1
            for start in range(0, len(prompt), BLOCK):
                above = known.setdefault((above, prompt[start : start + BLOCK].tobytes()), len(known))
                ids.append(above)
            found.append({"timestamp": round(now * 1e3), "input_length": len(prompt), "output_length": output,
                          "hash_ids": ids})  # fmt: skip
            pause = one.answered(prompt)
            now += output * SECONDS_A_TOKEN + (pause or 0.0)
    found.sort(key=lambda line: line["timestamp"])
    args.file.write_text("".join(json.dumps(line) + "\n" for line in found))
    tokens, blocks = sum(line["input_length"] for line in found), sum(len(line["hash_ids"]) for line in found)
    print(json.dumps({"requests": len(found), "mean_input": round(tokens / len(found)),
                      "endless_reuse": round(1 - len(known) / blocks, 3)}))  # fmt: skip


if __name__ == "__main__":
    main()
