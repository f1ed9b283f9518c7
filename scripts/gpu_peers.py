"""Servers side by side, for scripts/gpu_check.py: this one, and vLLM and SGLang where their packages are importable.

    python scripts/gpu_peers.py CONFIG.json [--engines phloem,vllm,sglang] [--workloads one,32,128,shared] [--seconds S]

Every engine serves random weights in the shapes of a config.json on the same device, behind `/v1/completions` with
token ids; one client sends the same requests to each. Where the device holds all of them at once, with the same room
for tokens, they take turns, round by round; else they run one after another. Two rounds of every workload with ids of
their own: the first is cold. `phloem-apart` is this engine with shared pages read for every row. One JSON object goes
to standard output; an engine that does not start, or ends, or for which no time is left, is told under `skipped`.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

SOURCE = str(Path(__file__).resolve().parent.parent / "src")
sys.path.insert(0, SOURCE)

from phloem.bench._http import Http, run  # noqa: E402

ENGINES = ("phloem", "phloem-apart", "vllm", "sglang")
ROUNDS = 2
TOKENS = 110_000  # that each may keep: 128 requests of 640, with room; 14 GiB for Llama-8B
# After a round, before the next engine's: what an engine does when it has nothing to do (ours records steps) is not to
# lie in another one's figures.
SETTLE = 1.5
ENDING = 8.0  # seconds that a server is given to end
SHARE_GIB = 38.0  # of the device for each: 15 of weights, the tokens, graphs and what libraries take


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


def command(engine: str, folder: Path, port: int, device: str, share: float = 0.0) -> list[str]:
    """What starts an engine; raises ImportError where its package is not there.

    `share`: of the device's memory, where others have the rest; 0: as the engine itself decides.
    """
    if engine.startswith("phloem"):
        more = ["--disable-cascade-attention"] if engine == "phloem-apart" else []
        more += ["--device", device] if device else []
        more += ["--max-total-tokens", str(TOKENS)] if share else []
        start = [sys.executable, "-m", "phloem", "serve", str(folder), "--load-format", "dummy"]
        return [*start, "--port", str(port), *more]
    if not installed(engine):
        raise ImportError(f"{engine} is not installed")
    common = ["--load-format", "dummy", "--port", str(port), "--served-model-name", "m"]
    if engine == "vllm":
        more = ["--gpu-memory-utilization", f"{share:.3f}"] if share else []
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *common, *more]
    more = ["--max-total-tokens", str(TOKENS)] if share else []
    return [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), *common, *more]


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Serving:
    """An engine as a process; it and its processes end with `close`."""

    def __init__(self, engine: str, folder: Path, device: str, share: float) -> None:
        self.engine, self.port = engine, free_port()
        line = command(engine, folder, self.port, device, share)
        path = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
        self._begun = time.perf_counter()
        self._process = subprocess.Popen(
            line, stdout=self._log, stderr=self._log, env={**os.environ, "PYTHONPATH": path}, start_new_session=True
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = str(folder) if engine.startswith("phloem") else "m"

    def ready(self, until: float) -> float:
        """Seconds from its start until it answered. Raises RuntimeError if it does not."""
        while not _answers(self.port):
            if self._process.poll() is not None or time.perf_counter() > until:
                raise RuntimeError(f"{self.engine} did not start: {self.tail()}")
            time.sleep(0.1)
        return time.perf_counter() - self._begun

    def ended(self, patience: float = 0.0) -> str:
        """How, if it has within so many seconds: a connection breaks before its process is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        code = self._process.poll()
        return "" if code is None else f"the server ended ({code}): {self.tail()}"

    def tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 1500))
        return self._log.read().decode(errors="replace").strip()[-800:]

    def close(self) -> None:
        _end(self._process)
        self._log.close()


def _answers(port: int) -> bool:
    async def ask() -> bool:
        http = Http(f"http://127.0.0.1:{port}", {})
        try:
            async with asyncio.timeout(5.0):
                return (await http.exchange("GET", "/health")).status == 200
        finally:
            http.close()

    try:
        return asyncio.run(ask())
    except (OSError, ValueError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """The engine and whatever it started: its own session."""
    for kind, patience in ((signal.SIGTERM, ENDING), (signal.SIGKILL, ENDING)):
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


@dataclass
class Answered:
    """When each token of an answer came: those of one event at once. `told`: how many the server says there were."""

    begun: float
    times: list[float]
    told: int


async def one(http: Http, model: str, ids: list[int], output: int) -> Answered:
    """One request. Every token is a word of the tokenizer, so an event's text says how many it brings."""
    body = {"model": model, "prompt": ids, "max_tokens": output, "temperature": 0.0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    found = Answered(time.perf_counter(), [], 0)
    answer = await http.exchange("POST", "/v1/completions", body)
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.body[:300]!r}")
    for at, line in answer.lines():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"in the middle of an answer: {str(event['error'])[:300]}")
        if choices := event.get("choices"):
            found.times.extend([at] * len(str(choices[0].get("text") or "").split()))
        if usage := event.get("usage"):
            found.told = int(usage["completion_tokens"])
    if not found.times:
        raise RuntimeError("no token came")
    return found


async def measure(url: str, model: str, load: Load, vocab: int, seed: int) -> dict[str, Any]:
    """One round of a workload."""
    http, gate = Http(url, {}), asyncio.Semaphore(load.flight)

    async def send(ids: list[int]) -> Answered:
        async with gate:
            return await one(http, model, ids, load.output)

    begun = time.perf_counter()
    try:
        found = await asyncio.gather(*(send(ids) for ids in prompts(load, vocab, seed)))
    finally:
        http.close()
    return figures(found, time.perf_counter() - begun)


def figures(found: Sequence[Answered], wall: float) -> dict[str, Any]:
    """Rates and latencies of a round. Rates count what the server says, and `unseen` how many of those no event showed;
    gaps are between one token and the next, so that those of one event have none between them."""
    told = sum(one.told or len(one.times) for one in found)
    seen = sum(len(one.times) for one in found)
    gaps = sorted(b - a for one in found for a, b in pairwise(one.times)) or [0.0]
    firsts = [one.times[0] - one.begun for one in found]
    spans = [(one.times[-1] - one.times[0], len(one.times) - one.times.count(one.times[0])) for one in found]
    return {
        "output_tok_per_s": told / wall,
        "decode_tok_per_s": sum(n for _, n in spans) / (sum(span for span, _ in spans) or 1e-9),
        "tokens": told,
        "unseen": told - seen,
        "ttft_ms_mean": 1e3 * sum(firsts) / len(firsts),
        "ttft_ms_max": 1e3 * max(firsts),
        "itl_ms_p50": 1e3 * gaps[len(gaps) // 2],
        "itl_ms_p99": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "wall_s": wall,
    }


def compare(
    config: dict[str, Any],
    engines: Sequence[str],
    loads: Sequence[Load],
    seconds: float,
    device: str = "",
    gib: tuple[float, float] = (0.0, 0.0),
    tell: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Every engine under every workload; `rounds` of each, the first of them cold. It ends within `seconds`.

    `gib`: free and in all on the device, by which it is decided whether the engines take turns. `tell` gets what there
    is after each round.
    """
    race = _Race(config, loads, time.perf_counter() + seconds, device, tell)
    turns = len(engines) > 1 and gib[0] >= SHARE_GIB * len(engines)
    race.found["interleaved"] = turns
    try:
        if turns:
            for engine in engines:
                race.start(engine, SHARE_GIB / gib[1])
            race.rounds()
        for engine in () if turns else engines:
            race.start(engine, 0.0)
            race.rounds()
            race.stop()
    finally:
        race.close()
    return race.found


class _Race:
    """The engines that run, and what was found."""

    def __init__(
        self, config: dict[str, Any], loads: Sequence[Load], until: float, device: str, tell: Callable[[Any], None]
    ) -> None:
        self.found: dict[str, Any] = {"engines": {}, "skipped": {}}
        self._loads, self._until, self._device, self._tell = loads, until, device, tell
        self._vocab = int(config["vocab_size"])
        self._running: dict[str, Serving] = {}
        self._place = tempfile.TemporaryDirectory()
        self._folder = Path(self._place.name)
        (self._folder / "config.json").write_text(json.dumps(config))
        tokenizer_files(self._folder, self._vocab)

    def start(self, engine: str, share: float) -> None:
        if time.perf_counter() > self._until:
            self.found["skipped"][engine] = "no time was left"
            return
        serving: Serving | None = None
        try:
            serving = Serving(engine, self._folder, self._device, share)
            self._running[engine] = serving
            self.found["engines"][engine] = {"ready_s": serving.ready(self._until), "rounds": {}}
        except (ImportError, RuntimeError, OSError) as error:
            self.give_up(engine, str(error))
        self._tell(self.found)

    def give_up(self, engine: str, why: str) -> None:
        self.found["skipped"][engine] = why[:1000]
        if engine in self._running:
            self._running.pop(engine).close()

    def rounds(self) -> None:
        """Each workload's rounds, by turns; who goes first changes."""
        for load in self._loads:
            for seed in range(ROUNDS):
                order = list(self._running)
                for engine in order[seed % max(1, len(order)) :] + order[: seed % max(1, len(order))]:
                    self._round(engine, load, seed)
                    self._tell(self.found)
                    if len(order) > 1 and time.perf_counter() + SETTLE < self._until:
                        time.sleep(SETTLE)

    def _round(self, engine: str, load: Load, seed: int) -> None:
        serving = self._running[engine]

        async def timed() -> dict[str, Any]:
            async with asyncio.timeout(max(0.5, self._until - time.perf_counter())):
                return await measure(serving.url, serving.model, load, self._vocab, seed)

        try:
            one = run(timed())
        except (RuntimeError, OSError, ValueError) as error:  # TimeoutError is an OSError
            late = isinstance(error, TimeoutError)
            why = serving.ended(0.0 if late else 2.0) or (
                "no answer until the time was over" if late else f"{type(error).__name__}: {error}"
            )
            self.give_up(engine, f"{load.name}, round {seed + 1}: {why}")
        else:
            self.found["engines"][engine]["rounds"].setdefault(load.name, []).append(one)

    def stop(self) -> None:
        for serving in self._running.values():
            serving.close()
        self._running.clear()

    def close(self) -> None:
        self.stop()
        self._place.cleanup()


def table(found: dict[str, Any]) -> list[str]:
    """Lines of a page: the last round of each workload, and the first one's rate beside it."""
    lines = ["| workload | engine | tok/s | cold tok/s | mean TTFT ms | ITL p50 / p99 ms |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for name in dict.fromkeys(name for one in found["engines"].values() for name in one["rounds"]):
        for engine, one in found["engines"].items():
            if one["rounds"].get(name):
                first, last = one["rounds"][name][0], one["rounds"][name][-1]
                rates = f"{last['output_tok_per_s']:.0f} | {first['output_tok_per_s']:.0f}"
                gaps = f"{last['itl_ms_p50']:.1f} / {last['itl_ms_p99']:.1f}"
                lines.append(f"| {name} | {engine} | {rates} | {last['ttft_ms_mean']:.0f} | {gaps} |")
    ready = ", ".join(f"{engine} {one['ready_s']:.0f} s" for engine, one in found["engines"].items())
    how = "by turns" if found.get("interleaved") else "one after another"
    lines += ["", f"Ready: {ready}. The engines ran {how}."] if ready else []
    return lines + [f"- {engine}: skipped ({' '.join(why.split())[:200]})" for engine, why in found["skipped"].items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--workloads", default=",".join(LOADS))
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--device", default="", help="of phloem")
    parser.add_argument("--gib", type=float, default=0.0, help="of the device: enough for all engines, they take turns")
    parser.add_argument("--tiny", action="store_true", help="a few short requests, to try the script")
    args = parser.parse_args()
    loads = TINY if args.tiny else LOADS
    chosen = [loads[name] for name in args.workloads.split(",")]
    config = json.loads(args.config.read_text())
    found = compare(config, args.engines.split(","), chosen, args.seconds, args.device, (args.gib, args.gib))
    print("\n".join(table(found)), file=sys.stderr)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
