"""Servers side by side, for scripts/gpu_check.py: this one, and vLLM and SGLang where their packages are importable.

    python scripts/gpu_peers.py CONFIG.json [--engines phloem,vllm,sglang] [--workloads one,32,128,shared] [--seconds S]

Every engine serves random weights in the shapes of a config.json, one after another on the same device, behind
`/v1/completions` with token ids; one client sends the same requests to each. Two rounds of every workload with ids of
their own: the first is cold. `phloem-apart` is this engine with shared pages read for every row. One JSON object goes
to standard output; an engine that does not start, or for which no time is left, is told under `skipped`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

SOURCE = str(Path(__file__).resolve().parent.parent / "src")
sys.path.insert(0, SOURCE)

from phloem.bench._http import Http, run  # noqa: E402

ENGINES = ("phloem", "phloem-apart", "vllm", "sglang")
ROUNDS = 2


@dataclass(frozen=True)
class Load:
    """Requests of `prefix` common tokens (a group has its own) and `prompt` more; `flight` of them at once."""

    name: str
    requests: int
    flight: int
    prompt: int
    output: int
    groups: int = 0
    prefix: int = 0


LOADS = {
    "one": Load("one", 3, 1, 512, 256),
    "32": Load("32", 96, 32, 512, 128),
    "128": Load("128", 256, 128, 512, 128),
    "shared": Load("shared", 128, 64, 64, 64, groups=8, prefix=2048),
}
TINY = {
    "one": Load("one", 1, 1, 12, 4),
    "32": Load("32", 4, 2, 12, 4),
    "128": Load("128", 6, 3, 12, 4),
    "shared": Load("shared", 6, 4, 8, 4, groups=2, prefix=160),
}


def tokenizer_files(folder: Path, vocab: int) -> None:
    """A tokenizer in which every id is a word: it serves to start an engine, and gives every token a text."""
    words = {f"w{number}": number for number in range(vocab)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    whole = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def command(engine: str, folder: Path, port: int, device: str) -> list[str]:
    """What starts an engine; raises ImportError where its package is not there."""
    if engine.startswith("phloem"):
        more = ["--disable-cascade-attention"] if engine == "phloem-apart" else []
        more += ["--device", device] if device else []
        start = [sys.executable, "-m", "phloem", "serve", str(folder), "--load-format", "dummy"]
        return [*start, "--port", str(port), *more]
    if importlib.util.find_spec(engine) is None:
        raise ImportError(f"{engine} is not installed")
    if engine == "vllm":
        start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        return [*start, "--load-format", "dummy", "--port", str(port), "--served-model-name", "m"]
    start = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder)]
    return [*start, "--load-format", "dummy", "--port", str(port), "--served-model-name", "m"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serving(engine: str, folder: Path, device: str, until: float) -> Iterator[tuple[str, float]]:
    """Start an engine; gives its address and the seconds until it answered. It and its processes end in any case."""
    port, begun = free_port(), time.perf_counter()
    line = command(engine, folder, port, device)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            while not _answers(port):
                if process.poll() is not None or time.perf_counter() > until:
                    log.seek(max(0, log.tell() - 1500))
                    told = log.read().decode(errors="replace").strip()
                    raise RuntimeError(f"{engine} did not start: {told[-800:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", time.perf_counter() - begun
        finally:
            _end(process)


def _answers(port: int) -> bool:
    async def ask() -> bool:
        http = Http(f"http://127.0.0.1:{port}", {})
        try:
            return (await http.exchange("GET", "/health")).status == 200
        finally:
            http.close()

    try:
        return asyncio.run(ask())
    except (OSError, ValueError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """The engine and whatever it started: its own session."""
    for kind, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if kind == signal.SIGKILL:
                return
    # What is left of the session when its first process has gone would keep the device's memory.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def prompts(load: Load, vocab: int, seed: int) -> list[list[int]]:
    """Token ids of every request; no two rounds have a prefix in common."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(2, vocab) for _ in range(count)]

    prefixes = [ids(load.prefix) for _ in range(load.groups)] or [[]]
    found = [prefixes[number % len(prefixes)] + ids(load.prompt) for number in range(load.requests)]
    draw.shuffle(found)
    return found


async def one(http: Http, model: str, ids: list[int], output: int) -> tuple[float, list[float], int]:
    """(Seconds to the first token, gaps between events, tokens)."""
    body = {"model": model, "prompt": ids, "max_tokens": output, "temperature": 0.0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    begun = time.perf_counter()
    answer = await http.exchange("POST", "/v1/completions", body)
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.body()[:300]!r}")
    times: list[float] = []
    tokens = 0
    for at, line in answer.lines():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("choices"):
            times.append(at)
        if usage := event.get("usage"):
            tokens = int(usage["completion_tokens"])
    if not times:
        raise RuntimeError("no token came")
    return times[0] - begun, [b - a for a, b in pairwise(times)], tokens


async def measure(url: str, model: str, load: Load, vocab: int, seed: int) -> dict[str, Any]:
    """One round of a workload."""
    http, gate = Http(url, {}), asyncio.Semaphore(load.flight)

    async def send(ids: list[int]) -> tuple[float, list[float], int]:
        async with gate:
            return await one(http, model, ids, load.output)

    begun = time.perf_counter()
    try:
        found = await asyncio.gather(*(send(ids) for ids in prompts(load, vocab, seed)))
    finally:
        http.close()
    wall = time.perf_counter() - begun
    gaps = sorted(gap for _, between, _ in found for gap in between) or [0.0]
    return {
        "output_tok_per_s": sum(tokens for _, _, tokens in found) / wall,
        "ttft_ms_mean": 1e3 * sum(first for first, _, _ in found) / len(found),
        "ttft_ms_max": 1e3 * max(first for first, _, _ in found),
        "itl_ms_p50": 1e3 * gaps[len(gaps) // 2],
        "itl_ms_p99": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "wall_s": wall,
    }


def compare(
    config: dict[str, Any], engines: Sequence[str], loads: Sequence[Load], seconds: float, device: str = ""
) -> dict[str, Any]:
    """Every engine under every workload; `rounds` of each, the first of them cold. It ends within `seconds`."""
    until = time.perf_counter() + seconds
    found: dict[str, Any] = {"engines": {}, "skipped": {}}
    vocab = int(config["vocab_size"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer_files(folder, vocab)
        for engine in engines:
            if time.perf_counter() > until:
                found["skipped"][engine] = "no time was left"
                continue
            try:
                found["engines"][engine] = _served(engine, folder, loads, vocab, device, until)
            except (ImportError, RuntimeError, OSError, TimeoutError) as error:
                found["skipped"][engine] = str(error)[:1000]
    return found


def _served(engine: str, folder: Path, loads: Sequence[Load], vocab: int, device: str, until: float) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    with serving(engine, folder, device, until) as (url, ready):
        model = str(folder) if engine.startswith("phloem") else "m"

        async def rounds() -> None:
            async with asyncio.timeout(max(1.0, until - time.perf_counter())):
                for load in loads:
                    for seed in range(ROUNDS):
                        rows.setdefault(load.name, []).append(await measure(url, model, load, vocab, seed))

        try:
            run(rounds())
        except TimeoutError:
            if not rows:
                raise
    return {"ready_s": ready, "rounds": rows}


def table(found: dict[str, Any]) -> list[str]:
    """Lines of a page: the last round of each workload, and the first one's rate beside it."""
    lines = ["| workload | engine | tok/s | cold tok/s | mean TTFT ms | ITL p50 / p99 ms |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for name in dict.fromkeys(name for one in found["engines"].values() for name in one["rounds"]):
        for engine, one in found["engines"].items():
            if name in one["rounds"]:
                first, last = one["rounds"][name][0], one["rounds"][name][-1]
                rates = f"{last['output_tok_per_s']:.0f} | {first['output_tok_per_s']:.0f}"
                gaps = f"{last['itl_ms_p50']:.1f} / {last['itl_ms_p99']:.1f}"
                lines.append(f"| {name} | {engine} | {rates} | {last['ttft_ms_mean']:.0f} | {gaps} |")
    ready = ", ".join(f"{engine} {one['ready_s']:.0f} s" for engine, one in found["engines"].items())
    lines += ["", f"Ready: {ready}."] if ready else []
    return lines + [f"- {engine}: skipped ({' '.join(why.split())[:200]})" for engine, why in found["skipped"].items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--workloads", default=",".join(LOADS))
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--device", default="", help="of phloem")
    parser.add_argument("--tiny", action="store_true", help="a few short requests, to try the script")
    args = parser.parse_args()
    loads = TINY if args.tiny else LOADS
    chosen = [loads[name] for name in args.workloads.split(",")]
    config = json.loads(args.config.read_text())
    found = compare(config, args.engines.split(","), chosen, args.seconds, args.device)
    print("\n".join(table(found)), file=sys.stderr)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
