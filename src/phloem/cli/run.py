"""Answer prompts offline: from arguments, standard input or JSONL, to JSONL."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

import phloem
from phloem.cli._options import media_parts, parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest, PhloemError

if TYPE_CHECKING:
    from phloem.llm import Engine

DESCRIPTION = (
    "Answer prompts without a server. Prompts come from --prompt, from --input (JSONL with a 'prompt', 'text', "
    "'input_ids' or 'messages' per line, or plain text lines), or from standard input; answers go to --output or "
    "standard output as JSONL, in the order of the prompts."
)
WINDOW = 256  # prompts that are with the engine at once


@dataclass(frozen=True)
class Options:
    prompt: tuple[str, ...] = opt((), "Prompts.")
    input: str | None = opt(None, "File of prompts; '-' is standard input.")
    output: str | None = opt(None, "File for the answers; default: standard output.")
    image: tuple[str, ...] = opt((), "Pictures that every prompt is about, before it: files or addresses.")
    video: tuple[str, ...] = opt((), "Videos that every prompt is about, before it: files or addresses.")
    chat: bool = opt(False, "Put each prompt through the chat template as a user's message.")
    max_new_tokens: int = opt(128, "Most tokens of an answer.")
    temperature: float = opt(0.0, "0 takes the most likely token.")
    top_p: float = opt(1.0, "Nucleus sampling.")
    seed: int | None = opt(None, "Seed of every prompt.")
    json_schema: str | None = opt(None, "File with a JSON schema that every answer must match.")


def main(argv: list[str]) -> int:
    config, options = parse("run", argv, Options, skip=("server",), description=DESCRIPTION)
    media = media_parts(options.image, options.video)
    jobs = [_with_media(job, media) for job in _jobs(options)]
    if not jobs:
        raise BadRequest("there are no prompts: use --prompt, --input FILE, or pipe lines in")
    settings = {**config.flat(), "log_level": "warning"}
    with ExitStack() as stack:
        # Opened before the model is loaded: a path that cannot be written is told at once.
        out = stack.enter_context(_open(options.output)) if options.output else sys.stdout
        engine = stack.enter_context(phloem.Engine(**settings))
        failed = asyncio.run(_answer_all(engine, jobs, options, out))
    return 1 if failed else 0


def _with_media(job: dict[str, Any], media: list[dict[str, Any]]) -> dict[str, Any]:
    """A question about pictures or videos is a user's message."""
    if not media:
        return job
    if "text" not in job and len(job.get("messages") or []) != 1:
        raise BadRequest("--image and --video go with prompts that are texts: others name their own")
    said = job.pop("text", None) or job.pop("messages")[0]["content"]
    parts = [*media, {"type": "text", "text": said}]
    return {**job, "messages": [{"role": "user", "content": parts}]}


def _open(path: str) -> TextIO:
    try:
        return Path(path).open("w")
    except OSError as error:
        raise BadRequest(f"cannot write {path}: {error.strerror}") from None


def _jobs(options: Options) -> Iterable[dict[str, Any]]:
    for prompt in options.prompt:
        yield {"messages": [{"role": "user", "content": prompt}]} if options.chat else {"text": prompt}
    source = options.input or (None if options.prompt or sys.stdin.isatty() else "-")
    if source is None:
        return
    try:
        lines = sys.stdin if source == "-" else Path(source).read_text().splitlines()
    except OSError as error:
        raise BadRequest(f"cannot read {source}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _job(line.rstrip("\n"), number, options.chat)


def _job(line: str, number: int, chat: bool) -> dict[str, Any]:
    if not line.lstrip().startswith("{"):
        return {"messages": [{"role": "user", "content": line}]} if chat else {"text": line}
    try:
        job: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise BadRequest(f"line {number} is not JSON: {error}") from None
    if "prompt" in job:
        job["text"] = job.pop("prompt")
    if not {"text", "input_ids", "messages"} & job.keys():
        raise BadRequest(f"line {number} has none of prompt, text, input_ids, messages")
    if chat and "text" in job:
        job["messages"] = [{"role": "user", "content": job.pop("text")}]
    return job


async def _answer_all(engine: Engine, jobs: list[dict[str, Any]], options: Options, out: TextIO) -> int:
    """Answer with many prompts in flight, write in order; gives how many failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    params = _params(options)
    gate = asyncio.Semaphore(WINDOW)
    tokens = failed = 0
    start = perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(jobs), rate="")

        async def one(job: dict[str, Any]) -> dict[str, Any]:
            nonlocal tokens, failed
            async with gate:
                try:
                    answer = await _answer(engine, job, params)
                    tokens += answer["meta_info"]["completion_tokens"]
                except PhloemError as error:
                    failed += 1
                    answer = {"error": error.message}
            bar.update(task, advance=1, rate=f"{tokens / (perf_counter() - start):,.0f} tok/s")
            return answer

        for work in [asyncio.ensure_future(one(job)) for job in jobs]:
            out.write(json.dumps(await work, ensure_ascii=False) + "\n")
            out.flush()
    seconds = perf_counter() - start
    print(f"{len(jobs)} prompts, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tok/s", file=sys.stderr)
    return failed


async def _answer(engine: Engine, job: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    job = dict(job)
    messages = job.pop("messages", None)
    merged = {**params, **job.pop("sampling_params", {})}
    if messages is not None:
        job["input_ids"] = engine.encode_chat(messages)
        pictures = engine.pictures_of(messages)
        job |= {"image_data": pictures} if pictures else {}
    text = job.pop("text", None)
    answer: Any = await engine.async_generate(text, merged, **job)
    return answer


def _params(options: Options) -> dict[str, Any]:
    params: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    if options.seed is not None:
        params["sampling_seed"] = options.seed
    if options.json_schema:
        try:
            params["json_schema"] = Path(options.json_schema).read_text()
        except OSError as error:
            raise BadRequest(f"cannot read {options.json_schema}: {error.strerror}") from None
    return params
