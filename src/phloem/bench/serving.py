"""Measure a server: any OpenAI-compatible or native endpoint, or one of our own."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phloem.bench._client import Client, Result, Target, run_workload
from phloem.bench._http import run
from phloem.bench._own_server import own_server
from phloem.bench._report import context, plot, print_table, summarise, write_line
from phloem.bench._text import Encoder, Texts
from phloem.bench._workloads import WORKLOADS, Sizes, Workload
from phloem.checkpoint.describe import describe
from phloem.cli._options import parse_own
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Options:
    url: str | None = opt(None, "Server to measure, such as http://127.0.0.1:30000; default: one of our own.")
    model: str = opt("demo", "Model name to ask for; without --url also the model that is served.")
    tokenizer: str = opt("demo", "Model path whose tokenizer measures the prompts.")
    api: Literal["completions", "generate"] = opt("completions", "Endpoint: /v1/completions or /generate.")
    api_key: str | None = opt(None, "Bearer token to send.")
    workload: str = opt("all", f"One of {', '.join(WORKLOADS)}; several with commas; or all.")
    requests: int | None = opt(None, "Requests (of one group, for shared-prefix; conversations, for conversations).")
    concurrency: int | None = opt(None, "Requests in flight at most.")
    input_len: int | None = opt(None, "Prompt length in tokens (of the prefix, for shared-prefix).")
    output_len: int | None = opt(None, "Output length in tokens.")
    groups: int = opt(8, "Groups of shared-prefix.")
    turns: int = opt(6, "Turns of a conversation.")
    rate: float = opt(4.0, "Requests a second of the workload 'rate'.")
    repeat: int = opt(1, "Runs of each workload.")
    warmup: bool = opt(True, "Send one small request before the first measurement.")
    seed: int = opt(1, "Seed of the prompts.")
    server_args: str = opt("", "Further arguments for our own server, as one string.")
    output: str | None = opt(None, "File to append JSON lines to.")
    plot: str | None = opt(None, "PNG file to draw; the workload's name is added when there are several.")


def main(argv: list[str]) -> int:
    options = parse_own("bench serving", argv, Options, __doc__ or "")
    names = list(WORKLOADS) if options.workload == "all" else options.workload.split(",")
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise BadRequest(f"unknown workload {unknown[0]!r}; known: {', '.join(WORKLOADS)}")
    encoder = load_encoder(options.tokenizer)
    with ExitStack() as stack:
        url = options.url
        if url is None:
            arguments = [options.model, "--log-level", "warning", *options.server_args.split()]
            url, ready = stack.enter_context(own_server(arguments))
            print(f"own server ready after {ready:.2f} s at {url}")
        target = Target(url.rstrip("/"), options.model, options.api, options.api_key)
        records = run(_measure(options, names, target, encoder))
    print_table(records, f"{target.url}, {options.model}")
    for record in records:
        print(json.dumps(record))
    return 1 if any(record["failed"] for record in records) else 0


def load_encoder(model_path: str) -> Encoder:
    """The tokenizer of a model path."""
    return load_tokenizer(describe(model_path))


async def _measure(options: Options, names: list[str], target: Target, encoder: Encoder) -> list[dict[str, Any]]:
    client = Client(target)
    records: list[dict[str, Any]] = []
    sizes = Sizes(
        options.requests, options.concurrency, options.input_len, options.output_len, options.groups, options.turns,
        options.rate,
    )  # fmt: skip
    try:
        if options.warmup:
            await client.ask(Texts(encoder, options.seed - 1).draw(32), 4, True)
        for name in names:
            for turn in range(options.repeat):
                # Each repetition has prompts of its own: a cache must not answer from the run before.
                load = WORKLOADS[name](Texts(encoder, options.seed + 1000 * turn), sizes)
                results, record = await measure(client, load)
                record["label"] = name if options.repeat == 1 else f"{name} {turn + 1}"
                records.append(record)
                if options.output:
                    write_line(Path(options.output), record)
                if options.plot:
                    plot(results, record, _plot_path(options.plot, record["label"], len(names) * options.repeat))
    finally:
        await client.close()
    return records


async def measure(client: Client, load: Workload) -> tuple[list[Result], dict[str, Any]]:
    """Run one workload with a progress bar; gives the results and their summary."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # It is drawn seldom: drawing takes milliseconds, from the cores that are measured.
    shown = Progress(*columns, TextColumn("{task.fields[rate]}"), transient=True, refresh_per_second=1)
    with shown as bar:
        total = sum(len(session.turns) for session in load.sessions)
        task = bar.add_task(load.name, total=total, rate="")
        done = 0

        def tick(result: Result) -> None:
            nonlocal done
            done += result.output_tokens
            elapsed = bar.tasks[task].elapsed or 1e-9
            bar.update(task, advance=1, rate=f"{done / elapsed:,.0f} tok/s")

        results, seconds = await run_workload(client, load, tick)
    record = {**context(), "url": client.target.url, "model": client.target.model}
    return results, {**record, **summarise(load.name, results, seconds)}


def _plot_path(path: str, label: str, count: int) -> Path:
    base = Path(path)
    return base if count == 1 else base.with_name(f"{base.stem}-{label.replace(' ', '-')}{base.suffix or '.png'}")
