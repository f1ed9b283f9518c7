"""Ranks on graphics cards, for scripts/gpu_check.py: what that way costs one, and two of them.

    python scripts/gpu_ranks.py one CONFIG.json [--rows 8] [--turns 6] [--device cpu]
    python scripts/gpu_ranks.py two FOLDER [--tokens 64] [--device cpu]

`one`: decode steps of one rank, alone and as the first of several would run them (told in words, its calls by NCCL, its
graphs agreed on), by turns in one process; random weights in the shapes of a config.json, or a checkpoint's. `two`, for
two cards: a model with random weights is written below FOLDER and answers on one rank and on two, the same in float32;
then the second rank's process is killed. One JSON object goes to standard output.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
CONTEXT, STEPS = 128, 24
SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
SMALL: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}


def _team(device: Any) -> Any:
    """That of one rank, which tells nobody."""
    from torch._C import _distributed_c10d as dist

    from phloem.core.resolve import Decision
    from phloem.distributed.comm import Threads
    from phloem.distributed.groups import Groups
    from phloem.distributed.mesh import Mesh
    from phloem.distributed.nccl import Nccl
    from phloem.engine.ranks.parallel import Team, encode_told

    host = Threads.group(1)[0]
    comm: Any = host if device is None else Nccl(0, 1, dist.HashStore(), device, 60.0, host)
    decision = Decision("tp_size", 1, "to see what it costs")
    return Team(Mesh.of(0), Groups(0, comm), lambda told: (encode_told(told), None)[1], lambda read: None, decision)


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a decode step each way; medians of all turns."""
    from phloem import platforms
    from phloem.bench.step import WARM, DecodeSteps, Options
    from phloem.checkpoint.describe import described
    from phloem.core.config import Config
    from phloem.engine import worker
    from phloem.engine.ranks.parallel import ParallelRunner

    settings: dict[str, Any] = {"skip_tokenizer_init": True, "model_path": str(args.path)}
    settings |= {"load_format": "dummy"} if args.path.is_file() else {}
    settings |= {"max_running_requests": args.rows, "max_total_tokens": args.rows * 512 + 64}
    settings |= {"chunked_prefill_size": 64, "context_length": 512, "record_graphs_before_ready": args.device != "cpu"}
    if args.device:
        settings["device"] = args.device
    config = Config.from_flat(settings)
    checkpoint = described(config.model)
    options = Options(batch=args.rows, context=CONTEXT, steps=STEPS)
    device = None if args.device == "cpu" else platforms.choose(args.device or "cuda", None)[0].device
    team = _team(device)
    runners = {
        "alone": worker.build(config, checkpoint, lambda phase, seconds: None).runner,
        "as a rank": worker.build(config, checkpoint, lambda phase, seconds: None, team).runner,
    }
    steps = {
        name: DecodeSteps(runner if name == "alone" else ParallelRunner(runner, team.tell), options)
        for name, runner in runners.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.turns + 1):  # the first one warms up
        for name, decode in steps.items():
            decode.run(0, WARM)
            begun = time.perf_counter()
            decode.run(WARM, STEPS)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - begun) / STEPS)
    for runner in runners.values():
        runner.close()
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {"rows": args.rows, "ms": middle, "ratio": middle["as a rank"] / middle["alone"], "turns": times}


def two(args: argparse.Namespace) -> dict[str, Any]:
    """Answers of one rank and of two, how fast, and how soon all is told that the second has gone."""
    import torch

    if not args.device and torch.cuda.device_count() < 2:
        return {"skipped": f"needs two cards, {torch.cuda.device_count()} is there"}
    from phloem import Engine
    from phloem.testing.checkpoints import tiny_checkpoint

    path = tiny_checkpoint("llama", args.path / "model", **(SMALL if args.device else SHAPE))
    common: dict[str, Any] = {"model_path": str(path), "dtype": "float32", "max_total_tokens": 4096}
    common |= {"device": args.device or "cuda"}
    texts = [f"{number} foxes jump over {number + 1} lazy dogs" for number in range(8)]
    params = {"temperature": 0.0, "max_new_tokens": args.tokens, "ignore_eos": True}
    found: dict[str, Any] = {"tok_per_s": {}}
    answers: list[Any] = []
    for size in (1, 2):
        with Engine(**common, tp_size=size) as engine:
            engine.generate(texts, params)
            begun = time.perf_counter()
            told: Any = engine.generate(texts, params)
            found["tok_per_s"][size] = 8 * args.tokens / (time.perf_counter() - begun)
            answers.append([one["output_ids"] for one in told])
            if size == 2:
                found["decided"] = dict(
                    (name, f"{value}: {why}") for name, value, why in engine.get_server_info()["decisions"]
                )["tp_size"]
                found["lost_after_s"] = _lose(engine, params)
    found["same_tokens"] = answers[0] == answers[1]
    return found


def _lose(engine: Any, params: dict[str, Any]) -> float:
    """Kill the second rank under a long request; seconds until that is answered."""
    from phloem.core.errors import EngineDead

    ended: list[tuple[float, BaseException | None]] = []

    def ask() -> None:
        try:
            engine.generate("a long story", {**params, "max_new_tokens": 2000})
            ended.append((time.perf_counter(), None))
        except EngineDead as error:
            ended.append((time.perf_counter(), error))

    asker = threading.Thread(target=ask)
    asker.start()
    until = time.monotonic() + 60
    while not engine.get_server_info()["internal_states"][0]["running"]:
        if time.monotonic() > until:
            raise RuntimeError("a long request was not begun within 60 s")
        time.sleep(0.01)
    begun = time.perf_counter()
    os.kill(_rank(), signal.SIGKILL)
    asker.join(60)
    if not ended or ended[0][1] is None:
        raise RuntimeError("a request outlived its rank" if ended else "a request of a rank that has gone hangs")
    return ended[0][0] - begun


def _rank() -> int:
    """The process id of the rank beside the first: a child of a child of this process."""
    for task in Path("/proc").glob("[0-9]*/cmdline"):
        words = task.read_bytes().split(b"\0")
        if b"phloem.launch.rank" in words:
            parent = int((task.parent / "stat").read_text().rpartition(")")[2].split()[1])
            grand = int((Path("/proc") / str(parent) / "stat").read_text().rpartition(")")[2].split()[1])
            if os.getpid() in (parent, grand):
                return int(task.parent.name)
    raise RuntimeError("no rank runs")


def main() -> int:
    faulthandler.register(signal.SIGUSR1)  # where it stands, if it has to be ended
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("one", "two"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer of `two`")
    parser.add_argument("--device", default="")
    args = parser.parse_args()
    found = one(args) if args.what == "one" else two(args)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
