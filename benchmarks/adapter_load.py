"""How long a caller waits for an adapter, and what a stream beside it feels of that.

    python benchmarks/adapter_load.py [MODEL] [--rank 16] [--loads 8] [--turns 3]

Each turn loads two random adapters of all linear layers by turns, under names that are loaded already: first with
nothing beside it, then beside one greedy stream. The first load of the process, and the first ones of either name,
count for themselves. A stream's gaps are the times between two of its tokens, as the caller gets them: those that
overlap a load, and, as machines have other things to do, those of as much time just before that load.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from time import perf_counter
from typing import Any

import phloem
from phloem.bench._report import context
from phloem.bench.lora import write

GOAL_MS, GOAL_GAPS = 50.0, 2.0  # of a gap: so many usual ones
NAMES = ("even", "odd")
PAUSE = 0.25  # seconds between two loads, in which a stream is as it usually is


class Stream:
    """One request that generates until it is told to stop, and when each of its tokens came."""

    def __init__(self, engine: Any) -> None:
        self.times: list[float] = []
        self._engine, self._stop = engine, False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Stream:
        self._thread.start()
        while len(self.times) < 32:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop = True
        self._thread.join()

    def _run(self) -> None:
        while not self._stop:
            params = {"max_new_tokens": 1500, "temperature": 0.0, "ignore_eos": True}
            answers = self._engine.generate("Once upon a time", params, stream=True)
            for _ in answers:
                self.times.append(perf_counter())
                if self._stop:
                    answers.close()
                    break

    def gaps(self, spans: list[tuple[float, float]]) -> list[list[float]]:
        """Those that overlap each span of time, in ms."""
        pairs = list(zip(self.times, self.times[1:], strict=False))
        return [[(b - a) * 1e3 for a, b in pairs if b > begin and a < end] for begin, end in spans]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loads", type=int, default=8, help="of a turn, alone and as many beside a stream")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    settings = {"enable_lora": True, "max_loaded_loras": 8, "max_lora_rank": options.rank}
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(NAMES):
            write(Path(folder) / name, options.model, options.rank, seed)
        with phloem.Engine(model_path=options.model, log_level="warning", **settings) as engine:
            record = {**context(), "rank": options.rank, **measure(engine, Path(folder), options)}
    _show(record)


def measure(engine: Any, folder: Path, options: Any) -> dict[str, Any]:
    """Milliseconds."""
    gc.collect()
    gc.freeze()  # as `phloem serve` does: else Python looks through all that was imported every few loads (0.1 s)
    time.sleep(1.0)  # what an engine does in the background once it is ready
    first = [_load(engine, folder, at) for at in range(4)]
    turns: list[dict[str, Any]] = []
    for _ in range(options.turns):
        alone = _loads(engine, folder, options.loads)
        with Stream(engine) as stream:
            beside = _loads(engine, folder, options.loads)
        before = [(begin - min(end - begin, PAUSE), begin) for begin, end in beside]
        gaps = {"gaps_of_loads": stream.gaps(beside), "gaps_before": stream.gaps(before)}
        turns.append({"alone": _ms(alone), "beside": _ms(beside), **gaps})
    return {"first": _ms(first), "turns": turns}


def _loads(engine: Any, folder: Path, count: int) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for at in range(count):
        time.sleep(PAUSE)
        found.append(_load(engine, folder, at))
    return found


def _load(engine: Any, folder: Path, at: int) -> tuple[float, float]:
    name = NAMES[at % len(NAMES)]
    begun = perf_counter()
    engine.load_lora_adapter(name, str(folder / name))
    return begun, perf_counter()


def _ms(spans: list[tuple[float, float]]) -> list[float]:
    return [(end - begin) * 1e3 for begin, end in spans]


def _show(record: dict[str, Any]) -> None:
    print("first loads of the process: " + ", ".join(f"{value:.0f}" for value in record["first"]) + " ms")
    for turn in record["turns"]:
        alone, beside = turn["alone"], turn["beside"]
        print(
            f"alone {min(alone):.0f} ms at least, median {statistics.median(alone):.0f} (goal {GOAL_MS:.0f}); "
            f"beside a stream {min(beside):.0f}, median {statistics.median(beside):.0f}"
        )
    usual = statistics.median(gap for turn in record["turns"] for gaps in turn["gaps_before"] for gap in gaps)
    for key, what in (("gaps_before", "without"), ("gaps_of_loads", "with a load")):
        spans = [gaps for turn in record["turns"] for gaps in turn[key]]
        longest = sorted(max(gaps) for gaps in spans)
        every = sorted(gap for gaps in spans for gap in gaps)
        beyond = sum(gap > GOAL_GAPS * usual for gap in every)
        print(
            f"gaps {what}: mean {statistics.fmean(every):.1f} ms, median {statistics.median(every):.1f}, 9 of 10 below "
            f"{every[len(every) * 9 // 10]:.1f}, longest of a load's time {statistics.median(longest):.1f} by median, "
            f"{longest[-1]:.1f} at most; {beyond / len(spans):.1f} a load beyond {GOAL_GAPS:.0f} usual ones"
        )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
