"""Draw pictures from a prompt and write them to files."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from phloem.cli._options import parse
from phloem.client.start import make_client
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.launch.door import EngineDoor, beginning
from phloem.launch.thread import EngineThread
from phloem.server.images import write
from phloem.server.images.body import ImagesBody
from phloem.utils import log

if TYPE_CHECKING:
    from phloem.client.client import EngineClient
    from phloem.core.messages import Draw

DESCRIPTION = "Draw pictures with a folder that has a model_index.json, and write them to files."
KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@dataclass(frozen=True)
class Options:
    prompt: str | None = opt(None, "What to draw.")
    output: str = opt("picture.png", "File to write: .png, .jpg or .webp; several pictures are numbered.")
    n: int = opt(1, "How many pictures.")
    size: str | None = opt(None, "WIDTHxHEIGHT in pixels; default: the model's own.")
    num_inference_steps: int | None = opt(None, "Denoising steps; default: the model's own.")
    guidance_scale: float | None = opt(None, "How strongly the prompt is followed; default: the model's own.")
    true_cfg_scale: float | None = opt(None, "The same, of models that take a negative prompt by this name.")
    negative_prompt: str | None = opt(None, "What to stay away from.")
    seed: int | None = opt(None, "Seed of the first picture; default: drawn, and told.")


def main(argv: list[str]) -> int:
    config, options = parse("generate", argv, Options, skip=("server",), description=DESCRIPTION)
    body = _body(options)
    target, draws = Path(options.output), body.draws()
    _check_writable([numbered(target, at, len(draws)) for at in range(len(draws))])
    log.configure("warning")
    with beginning():
        client, info, checkpoint = make_client(config)
        info.check_draws()
        link = EngineThread(config, checkpoint)
        door = EngineDoor(client, link)
    try:
        return door.run(_draw(client, link, draws, body, target))
    finally:
        door.end("done")


def _body(options: Options) -> ImagesBody:
    """The request, as HTTP would bring it. Raises BadRequest."""
    if not options.prompt:
        raise BadRequest("nothing to draw: use --prompt")
    suffix = Path(options.output).suffix.lower()
    if suffix not in KINDS:
        raise BadRequest(f"{options.output}: expected a file named {', '.join(KINDS)}")
    body = ImagesBody(
        prompt=options.prompt,
        n=options.n,
        size=options.size,
        seed=options.seed,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        true_cfg_scale=options.true_cfg_scale,
        negative_prompt=options.negative_prompt,
        output_format=KINDS[suffix],  # type: ignore[arg-type]
    )
    write.check_format(body)
    return body


def _check_writable(paths: list[Path]) -> None:
    """Before anything is drawn. Raises BadRequest."""
    for path in paths:
        if path.is_dir():
            raise BadRequest(f"cannot write {path}: it is a folder")
    folder = paths[0].parent
    if not folder.is_dir():
        raise BadRequest(f"cannot write {paths[0]}: there is no folder {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadRequest(f"cannot write {paths[0]}: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, whatever was there before. Raises BadRequest."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadRequest(f"cannot write {path}: {error.strerror}") from None


async def _draw(client: EngineClient, link: EngineThread, draws: list[Draw], body: ImagesBody, target: Path) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    client.attach(link)
    client.start()
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        loading = bar.add_task("loading", total=None)
        await client.wait_ready()
        bar.remove_task(loading)
        begun, written = perf_counter(), list[str]()
        task = bar.add_task("steps", total=None)
        steps = dict.fromkeys((draw.id for draw in draws), 0)
        call = client.draw(draws)
        try:
            async for told in call:
                steps[told.id] = told.step
                bar.update(task, completed=sum(steps.values()), total=told.steps * len(draws))
                if told.done:  # what is finished stays, also where the next one fails
                    path, seed = numbered(target, call.order[told.id], len(draws)), draws[call.order[told.id]].seed
                    _write(path, write.file_of(told, body.output_format or "png", None))
                    written.append(f"{path}: {told.width}x{told.height}, {told.steps} steps, seed {seed}")
        finally:
            bar.stop()
            print("\n".join(written))
    print(f"{len(draws)} in {perf_counter() - begun:.2f} s", file=sys.stderr)
    return 0


def numbered(target: Path, at: int, count: int) -> Path:
    """`cat.png`; of several, `cat-1.png` and so on."""
    if count == 1:
        return target
    stem = re.sub(r"-\d+$", "", target.stem)
    return target.with_name(f"{stem}-{at + 1}{target.suffix}")
