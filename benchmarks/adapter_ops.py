"""What the ops of a recorded decode step take without adapters, with one and with one for each row.

    python benchmarks/adapter_ops.py [MODEL] [--rows 32] [--rank 16]

Medians over replays of whole steps, each timed op by op by the recording itself; random adapters of all linear layers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import phloem
from phloem.bench._text import Texts
from phloem.bench.lora import write
from phloem.engine.recorded.graphs import RecordedStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    rows, seen, calls = options.rows, list[Counter[str]](), Counter[str]()
    replay = RecordedStep.replay

    def noted(step: Any, *sizes: int) -> Any:
        outputs = replay(step, *sizes)
        if (sizes or (step.size, step.size))[:2] == (rows, rows):  # all rows decode
            taken = Counter[str]()
            calls.clear()
            for name, _, nanoseconds in getattr(step.graph, "_step", step.graph).replay_timed():
                taken[name] += nanoseconds
                calls[name] += 1
            seen.append(taken)
        return outputs

    settings: dict[str, Any] = {"enable_lora": True, "max_loaded_loras": rows, "max_lora_rank": options.rank}
    settings |= {"max_running_requests": rows, "disable_radix_cache": True, "log_level": "warning"}
    RecordedStep.replay = noted
    with tempfile.TemporaryDirectory() as folder, phloem.Engine(model_path=options.model, **settings) as engine:
        for number in range(rows):
            path = Path(folder) / f"a{number}"
            write(path, engine.config.model.model_path, options.rank, number)
            engine.load_lora_adapter(path.name, str(path))
        prompts = [Texts(engine.tokenizer, seed).draw(32) for seed in range(rows)]
        params = {"max_new_tokens": 2 * rows, "temperature": 0.0, "ignore_eos": True}
        for count in (0, 1, rows):
            seen.clear()
            engine.generate(prompts, params, lora_path=[f"a{at % count}" if count else None for at in range(rows)])
            print(f"{count} adapters, {rows} rows, {len(seen)} steps:")
            for name in calls if seen else ():
                milliseconds = statistics.median(taken[name] for taken in seen) / 1e6
                print(f"  {milliseconds:8.3f} ms {calls[name]:5d} times  {name}")


if __name__ == "__main__":
    main()
