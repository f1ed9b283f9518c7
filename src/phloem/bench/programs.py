"""Measure programs of many calls: with shared prefixes and parallel calls, without either, and on other servers."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any, Literal

from phloem.bench._own_server import own_server
from phloem.bench._report import context, percentile, write_line
from phloem.cli._options import parse_own
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.lang.backends._base import Answer, Backend, Meta, Prompt
from phloem.lang.backends.http import RuntimeEndpoint
from phloem.lang.backends.openai import OpenAI
from phloem.lang.chat import ChatFormat
from phloem.lang.choices import ChoicesDecision, ChoicesMethod
from phloem.lang.ir import Sampling

# Programs of one run, where --count is not given: enough of each for its kind of sharing to show.
COUNTS = {"few_shot": 8, "tree_of_thought": 1, "long_qa": 8, "json_decode": 4}
SHARED, PLAIN, OTHER = "shared, parallel", "uncached, sequential", "other server"


@dataclass(frozen=True)
class Options:
    url: str | None = opt(None, "Server to measure; default: one of our own, and a second one without radix cache.")
    model: str = opt("demo", "Model that our own server serves.")
    api_key: str | None = opt(None, "Bearer token to send.")
    programs: str = opt("all", "Names of examples, with commas; or all.")
    folder: str | None = opt(None, "Folder of the programs; default: examples/lang beside the source.")
    count: int | None = opt(None, "Cases of each program.")
    seed: int = opt(1, "Seed of the cases.")
    repeat: int = opt(1, "Runs of each program.")
    baseline: bool = opt(True, "Also run without sharing: no radix cache, one call after the other.")
    other_url: str | None = opt(None, "Also run on this OpenAI-compatible server, such as http://127.0.0.1:8080/v1.")
    other_model: str = opt("default", "Model name to ask the other server for.")
    other_api: Literal["completions", "chat"] = opt("completions", "Endpoint of the other server.")
    other_key: str = opt("none", "API key for the other server.")
    server_args: str = opt("", "Further arguments for our own server, as one string.")
    output: str | None = opt(None, "File to append JSON lines to.")


@dataclass
class Call:
    """One call of the model, as its program saw it."""

    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass
class Recorder(Backend):
    """A backend that counts what passes through it."""

    inner: Backend
    calls: list[Call] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def chat_only(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.chat_only

    @property
    def format(self) -> ChatFormat:
        return self.inner.format

    def _note(self, begun: float, meta: Meta | list[Meta]) -> None:
        for one in meta if isinstance(meta, list) else [meta]:
            self._add(
                perf_counter() - begun,
                one.get("prompt_tokens") or 0,
                one.get("cached_tokens") or 0,
                one.get("completion_tokens") or 0,
            )

    def _add(self, *values: Any) -> None:
        with self._lock:
            self.calls.append(Call(*values))

    def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        begun = perf_counter()
        text, meta = self.inner.generate(prompt, sampling)
        self._note(begun, meta)
        return text, meta

    def generate_stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[tuple[str, Meta]]:
        begun, meta = perf_counter(), dict[str, Any]()
        for piece, news in self.inner.generate_stream(prompt, sampling):
            meta.update(news)
            yield piece, news
        self._note(begun, meta)

    def select(self, prompt: Prompt, choices: list[str], method: ChoicesMethod) -> ChoicesDecision:
        begun = perf_counter()
        decision = self.inner.select(prompt, choices, method)
        self._note(begun, decision.meta_info)
        return decision

    def cache_prefix(self, text: str) -> Meta | None:
        begun = perf_counter()
        meta = self.inner.cache_prefix(text)
        if meta is not None:
            self._note(begun, meta)
        return meta


def main(argv: list[str]) -> int:
    options = parse_own("bench programs", argv, Options, __doc__ or "")
    modules = load(options)
    records: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for how, backend in _backends(options, stack):
            for name, module in modules.items():
                for _ in range(options.repeat):
                    record = measure(name, module, how, backend, options)
                    records.append(record)
                    print(f"{name} ({how}): {record['seconds']:.2f} s", file=sys.stderr, flush=True)
                    if options.output:
                        write_line(Path(options.output), _plain(record))
    compare(records)
    show(records, options.url or options.model)
    for record in records:
        print(json.dumps(_plain(record)))
    return 1 if any(record["failed"] for record in records if record["how"] != OTHER) else 0


def load(options: Options) -> dict[str, ModuleType]:
    """The programs by name. Each file has `program`, `cases(count, seed)` and `show(state)`."""
    here = Path(__file__).resolve().parents[3] / "examples" / "lang"
    folder = Path(options.folder) if options.folder else here
    known = sorted(file.stem for file in folder.glob("*.py") if not file.name.startswith("_"))
    if not known:
        raise BadRequest(f"there are no programs in {folder}: name the folder examples/lang of the source by --folder")
    names = known if options.programs == "all" else options.programs.split(",")
    for name in names:
        if name not in known:
            raise BadRequest(f"unknown program {name!r}; known: {', '.join(known)}")
    sys.path.insert(0, str(folder))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(folder))


def _backends(options: Options, stack: ExitStack) -> Iterator[tuple[str, Backend]]:
    """One after the other, so that servers of our own never run side by side."""
    form: ChatFormat | None = None
    for how in (SHARED, PLAIN) if options.baseline else (SHARED,):
        with ExitStack() as inside:
            url = options.url
            if url is None:
                arguments = [options.model, "--log-level", "warning", *options.server_args.split()]
                arguments += ["--disable-radix-cache"] if how == PLAIN else []
                url, _ = inside.enter_context(own_server(arguments))
            backend = RuntimeEndpoint(url, options.api_key, sharing=how == SHARED)
            inside.callback(backend.shutdown)
            form = backend.format
            yield how, backend
    if options.other_url:
        chat = options.other_api == "chat"
        other = OpenAI(options.other_model, chat, form, api_key=options.other_key, base_url=options.other_url)
        stack.callback(other.shutdown)
        yield OTHER, other


def measure(name: str, module: Any, how: str, backend: Backend, options: Options) -> dict[str, Any]:
    """Run one program on all its cases; times in seconds."""
    count = options.count or COUNTS.get(name, 2)
    calls = module.cases(count, options.seed)
    if how != OTHER:
        warm = Prompt("Hello")
        backend.generate(warm, Sampling(max_new_tokens=2, temperature=0.0))
        backend.flush_cache()
    recorder = Recorder(backend)
    parallel = how != PLAIN
    begun = perf_counter()
    threads: int | str = "auto" if parallel else 1
    states: Any = module.program.run_batch(
        calls, backend=recorder, num_threads=threads, use_thread=parallel, temperature=0.0
    )
    seconds = perf_counter() - begun
    failed = [state.error() for state in states if state.error() is not None]
    found = recorder.calls
    prompt = sum(call.prompt_tokens for call in found)
    cached = sum(call.cached_tokens for call in found)
    latencies = [state.seconds for state in states]
    return {
        **context(),
        "program": name,
        "how": how,
        "cases": count,
        "failed": len(failed),
        "errors": sorted({f"{type(error).__name__}: {error}"[:300] for error in failed})[:3],
        "seconds": seconds,
        "calls": len(found),
        "programs_per_s": count / seconds,
        "calls_per_s": len(found) / seconds,
        "prompt_tokens": prompt,
        "computed_prompt_tokens": prompt - cached,
        "output_tokens": sum(call.output_tokens for call in found),
        "output_tok_per_s": sum(call.output_tokens for call in found) / seconds,
        "cache_hit_rate": cached / prompt if prompt else 0.0,
        "latency_s": {"p50": percentile(latencies, 0.5), "max": max(latencies)},
        "call_latency_s": {"p50": percentile([call.seconds for call in found], 0.5)},
        "texts": [repr((state.text(), sorted(state.stream_executor.content.variables.items()))) for state in states],
    }


def compare(records: Sequence[dict[str, Any]]) -> None:
    """Set each record's `speedup` over the plain run of the same program, and how many texts came out the same."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        key = record["program"], record["how"]
        if key not in best or record["seconds"] < best[key]["seconds"]:
            best[key] = record
    for record in records:
        plain = best.get((record["program"], PLAIN))
        usable = plain is not None and not plain["failed"] and not record["failed"]
        record["speedup"] = plain["seconds"] / record["seconds"] if usable and plain is not None else None
        record["same_texts"] = (
            sum(a == b for a, b in zip(record["texts"], plain["texts"], strict=True)) if plain is not None else None
        )


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "texts"}


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    ("calls", lambda r: r["calls"]),
    ("seconds", lambda r: f"{r['seconds']:.2f}"),
    ("prog/s", lambda r: f"{r['programs_per_s']:.2f}"),
    ("out tok/s", lambda r: f"{r['output_tok_per_s']:.0f}"),
    ("latency, s", lambda r: f"{r['latency_s']['p50']:.2f}"),
    ("hit rate", lambda r: f"{r['cache_hit_rate']:.2f}"),
    ("prompt tokens", lambda r: f"{r['prompt_tokens']:,}"),
    ("computed", lambda r: f"{r['computed_prompt_tokens']:,}"),
    ("same texts", lambda r: "-" if r["same_texts"] is None else f"{r['same_texts']}/{r['cases']}"),
    ("speed-up", lambda r: "-" if r["speedup"] is None else f"{r['speedup']:.1f}x"),
)


def show(records: Sequence[dict[str, Any]], title: str) -> None:
    """The runs of a program side by side, one line each."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"programs on {title}")
    table.add_column("program", no_wrap=True)
    table.add_column("run", no_wrap=True)
    for label, _ in _COLUMNS:
        table.add_column(label, justify="right", no_wrap=True)
    order = {SHARED: 0, PLAIN: 1, OTHER: 2}
    last = ""
    for record in sorted(records, key=lambda r: (r["program"], order[r["how"]])):
        name = record["program"]
        cells = [str(value(record)) for _, value in _COLUMNS]
        if record["failed"]:
            cells[-1] = f"{record['failed']} failed"
        table.add_row(name if name != last else "", record["how"], *cells, end_section=False)
        last = name
    console = Console()
    # Piped output is 80 columns wide by default: too narrow for a line to stay one.
    (console if console.is_terminal else Console(width=170)).print(table)
    for record in records:
        for error in record["errors"]:
            print(f"{record['program']} ({record['how']}): {error}", file=sys.stderr)
