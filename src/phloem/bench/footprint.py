"""What a server costs in memory, and in processor time while nobody asks.

Starts `phloem serve` and looks at its processes just after it is ready, after the workload W3, and when the whole KV
pool has been written: resident memory (RSS) summed; `resident`, in which a file that several of its processes map
counts once; the proportional set (PSS), in which such pages count in shares, also with processes that are not the
server's; and what the pages belong to. In between it leaves the server alone and counts its processor time.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from phloem.bench._client import Client, Target
from phloem.bench._peers import phloem, running
from phloem.bench._report import context, write_line
from phloem.bench._text import Encoder, Texts
from phloem.bench._workloads import WORKLOADS, Session, Sizes, Turn, Workload
from phloem.bench.serving import load_encoder, measure
from phloem.cli._options import parse_own
from phloem.core.config import opt
from phloem.core.errors import BadRequest, PhloemError

PROMPT = 1800  # tokens of the requests that fill the pool
SETTLE = 3.0  # seconds for what a server does of its own accord after it is ready, or after work


@dataclass(frozen=True)
class Options:
    model: str = opt("demo", "Model to serve.")
    kv_tokens: int = opt(65_536, "Size of the KV pool in tokens, all of which are written in the end.")
    kv_cache_dtype: str = opt("auto", "Type of the KV cache.")
    server_args: str = opt("", "Further arguments for the server, as one string.")
    idle: float = opt(20.0, "Seconds for which the server is left alone, each time.")
    limit_gb: float = opt(0.0, "Exit with status 1 when more is ever resident (10^9 bytes); 0: no limit.")
    limit_idle: float = opt(0.0, "Exit with status 1 when an idle server takes more percent of a core; 0: no limit.")
    seed: int = opt(1, "Seed of the prompts.")
    output: str | None = opt(None, "File to append JSON lines to, one for each moment.")


def main(argv: list[str]) -> int:
    options = parse_own("bench footprint", argv, Options, __doc__ or "")
    if sys.platform != "linux":
        raise PhloemError("this benchmark reads /proc, which Linux alone has")
    if options.kv_tokens < 2 * PROMPT or options.idle <= 0:
        raise BadRequest(f"--kv-tokens must be at least {2 * PROMPT}, and --idle above 0")
    arguments = f"--max-total-tokens {options.kv_tokens} --kv-cache-dtype {options.kv_cache_dtype}"
    peer = phloem(options.model, f"{arguments} {options.server_args}")
    encoder = load_encoder(options.model)
    with TemporaryDirectory() as folder, running(peer, Path(folder) / "server.log") as server:
        target = Target(server.url, peer.model)
        records = asyncio.run(_moments(options, server.pid, target, encoder))
    about = {**context(), "model": Path(options.model).name, "ready_s": server.ready_s}
    about |= {"kv_tokens": options.kv_tokens, "kv_cache_dtype": options.kv_cache_dtype}
    for record in records:
        record["peak_rss"] = server.peak_bytes
        if options.output:
            write_line(Path(options.output), {**about, **record})
        print(json.dumps({**about, **record}))
    _show(records)
    heavy = 0 < options.limit_gb * 1e9 < max(record["resident"] for record in records)
    busy = 0 < options.limit_idle < max(record.get("idle_percent", 0.0) for record in records)
    return int(heavy or busy)


async def _moments(options: Options, pid: int, target: Target, encoder: Encoder) -> list[dict[str, Any]]:
    client = Client(target, fresh=True)
    records = [{"moment": "ready", **memory_of(family(pid))}]
    try:
        await asyncio.sleep(SETTLE)
        records.append({"moment": "idle after the start", **await _idle(options.idle, pid), **memory_of(family(pid))})
        for name, load in (
            ("after W3", WORKLOADS["throughput"](Texts(encoder, options.seed), Sizes())),
            ("KV pool full", filling(Texts(encoder, options.seed + 1), options.kv_tokens)),
        ):
            _, figures = await measure(client, load)
            if figures["failed"]:
                raise PhloemError(f"{figures['failed']} requests failed: {'; '.join(figures['errors'])}")
            records.append({"moment": name, **memory_of(family(pid))})
        await asyncio.sleep(SETTLE)
        records.append({"moment": "idle after work", **await _idle(options.idle, pid), **memory_of(family(pid))})
    finally:
        await client.close()
    return records


def filling(texts: Texts, tokens: int) -> Workload:
    """Different prompts that are `tokens` long together and some more: the prefix cache keeps as many as it can."""
    sessions = [Session([Turn(texts.draw(PROMPT), 1)]) for _ in range(tokens // PROMPT + 2)]
    return Workload("filling", sessions, 4)


async def _idle(seconds: float, pid: int) -> dict[str, float]:
    """Processor time while nobody asks, in percent of one core."""
    before, begun = processor_seconds(family(pid)), time.perf_counter()
    await asyncio.sleep(seconds)
    used, passed = processor_seconds(family(pid)) - before, time.perf_counter() - begun
    return {"idle_seconds": passed, "idle_percent": 100.0 * used / passed}


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    import psutil

    root = psutil.Process(pid)
    return [pid, *(child.pid for child in root.children(recursive=True))]


def processor_seconds(pids: Iterable[int]) -> float:
    """User and system time that processes have taken so far, that of threads that have ended among it."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_of(pids: Iterable[int]) -> dict[str, Any]:
    """Bytes: `rss` and `pss` summed, `resident` with every file once (as much of it as the process has that has most),
    `parts`: that by what the pages belong to, `processes` with each one's own."""
    total = {"rss": 0, "pss": 0}
    private: Counter[str] = Counter()
    files: Counter[str] = Counter()
    processes: list[dict[str, Any]] = []
    for pid in pids:
        found = mappings(Path(f"/proc/{pid}/smaps").read_text())
        rss, pss = (sum(entry[i] for entry in found.values()) for i in range(2))
        processes.append({"name": _name(pid), "rss": rss, "pss": pss})
        total["rss"] += rss
        total["pss"] += pss
        for path, (size, _) in found.items():
            if path.startswith("/"):
                files[path] = max(files[path], size)
            else:
                private[path] += size
    parts: Counter[str] = Counter()
    for path, size in (private + files).items():
        parts[_kind(path)] += size
    return {**total, "resident": parts.total(), "parts": dict(parts.most_common()), "processes": processes}


_HEAD = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


def mappings(smaps: str) -> dict[str, tuple[int, int]]:
    """(RSS, PSS) in bytes by the path that is mapped, from a process's `/proc/PID/smaps`."""
    sums: dict[str, tuple[int, int]] = {}
    path, rss = "", 0
    for line in smaps.splitlines():
        head = _HEAD.match(line)
        if head:
            path = head[1]
        elif line.startswith("Rss:"):
            rss = int(line.split()[1]) * 1024
        elif line.startswith("Pss:"):
            before = sums.get(path, (0, 0))
            sums[path] = (before[0] + rss, before[1] + int(line.split()[1]) * 1024)
    return sums


def _kind(path: str) -> str:
    if not path:
        return "anonymous"  # weights, KV pool, large buffers
    if path == "[heap]":
        return "heap"
    if path.startswith("["):
        return "stacks and other"
    name = path.removesuffix(" (deleted)")
    if name.endswith((".gguf", ".safetensors")):
        return "model file"
    if re.search(r"/torch/lib/|/torch/_C", name):
        return "torch's libraries"
    return "other libraries and files"


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return "engine" if "phloem.launch" in words else "door" if "serve" in words else Path(words[0]).name


def _show(records: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="memory in MB")
    table.add_column("")
    for record in records:
        table.add_column(record["moment"], justify="right")

    def row(name: str, values: Iterable[float | None], form: str = ",.0f") -> None:
        table.add_row(name, *("-" if value is None else format(value, form) for value in values))

    row("RSS, all processes", (record["rss"] / 1e6 for record in records))
    row("resident, shared files once", (record["resident"] / 1e6 for record in records))
    row("PSS, all processes", (record["pss"] / 1e6 for record in records))
    for name in dict.fromkeys(process["name"] for record in records for process in record["processes"]):
        row(f"RSS of {name}", (sum(p["rss"] for p in r["processes"] if p["name"] == name) / 1e6 for r in records))
    for kind in records[-1]["parts"]:
        row(kind, (record["parts"].get(kind, 0) / 1e6 for record in records))
    row("processor while idle, % of a core", (record.get("idle_percent") for record in records), ".2f")
    Console().print(table)
