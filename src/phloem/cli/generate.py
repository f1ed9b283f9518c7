"""Draw pictures, or make a film, from a prompt and write them to files."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from phloem.cli._options import parse
from phloem.cli._preview import Preview
from phloem.client.start import make_client
from phloem.core.adapters import adapter_spec
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.diffusion.request import Facts
from phloem.launch.door import EngineDoor, beginning
from phloem.launch.thread import EngineThread
from phloem.server.images import write
from phloem.server.images.body import ImagesBody, LoraBody
from phloem.server.images.given import decoded
from phloem.server.videos.body import VideosBody
from phloem.server.videos.film import FilmWriter, check_codec
from phloem.utils import log

if TYPE_CHECKING:
    from phloem.client.client import EngineClient
    from phloem.core.messages import Draw, Painted, Pixels

DESCRIPTION = "Draw pictures or a film with a folder that has a model_index.json, and write them to files."
KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
FILM = ".mp4"


@dataclass(frozen=True)
class Options:
    prompt: str | None = opt(None, "What to draw.")
    output: str = opt("picture.png", "File to write: .png, .jpg or .webp, several are numbered; a film: .mp4.")
    image: str | None = opt(None, "Picture to change, or with which a film begins.")
    n: int = opt(1, "How many pictures.")
    size: str | None = opt(None, "WIDTHxHEIGHT in pixels; default: the model's own.")
    num_inference_steps: int | None = opt(None, "Denoising steps; default: the model's own.")
    guidance_scale: float | None = opt(None, "How strongly the prompt is followed; default: the model's own.")
    guidance_scale_2: float | None = opt(None, "The same for the later steps, of films by two transformers.")
    num_frames: int | None = opt(None, "Frames of a film; default: the model's own.")
    seconds: float | None = opt(None, "How long a film is, instead.")
    fps: float | None = opt(None, "Frames a second of a film; default: the model's own.")
    true_cfg_scale: float | None = opt(None, "The same, of models that take a negative prompt by this name.")
    negative_prompt: str | None = opt(None, "What to stay away from.")
    lora: list[str] | None = opt(None, "Adapters of --lora-paths to draw with, NAME or NAME:SCALE; default: all.")
    seed: int | None = opt(None, "Seed of the first picture; default: drawn, and told.")


def main(argv: list[str]) -> int:
    config, options = parse("generate", argv, Options, skip=("server",), description=DESCRIPTION)
    body = _body(options)
    body.lora = _worn(options.lora, config.lora.lora_paths)
    target = Path(options.output)
    count = 1 if isinstance(body, VideosBody) else body.count()
    _check_writable([numbered(target, at, count) for at in range(count)])
    given = [_read(options.image)] if options.image else []
    log.configure("warning")
    with beginning():
        client, info, checkpoint = make_client(config)
        info.check_draws()
        link = EngineThread(config, checkpoint)
        door = EngineDoor(client, link)
    try:
        return door.run(_draw(client, link, body, given, target))
    finally:
        door.end("done")


def _body(options: Options) -> ImagesBody | VideosBody:
    """The request, as HTTP would bring it. Raises BadRequest."""
    if not options.prompt:
        raise BadRequest("nothing to draw: use --prompt")
    suffix = Path(options.output).suffix.lower()
    if suffix == FILM:
        return _film_body(options, options.prompt)
    for name in ("guidance_scale_2", "num_frames", "seconds", "fps"):
        if dataclasses.asdict(options)[name] is not None:
            raise BadRequest(f"{name}: pictures have none; a film is written to a file named {FILM}", param=name)
    if suffix not in KINDS:
        raise BadRequest(f"{options.output}: expected a file named {', '.join([*KINDS, FILM])}")
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


def _worn(asked: list[str] | None, given: list[str] | None) -> list[str | LoraBody] | None:
    """Raises BadRequest."""
    if asked is None:
        return [adapter_spec(text).name for text in given or []] or None
    found: list[str | LoraBody] = []
    for one in asked:
        name, colon, scale = one.rpartition(":")
        try:
            found.append(LoraBody(name=name, scale=float(scale)) if colon else one)
        except ValueError:
            raise BadRequest(f"lora: {one}: expected NAME or NAME:SCALE", param="lora") from None
    return found


def _film_body(options: Options, prompt: str) -> VideosBody:
    if options.n != 1:
        raise BadRequest(f"n: {options.n}: one film at a time", param="n")
    check_codec()
    return VideosBody(
        prompt=prompt,
        size=options.size,
        seed=options.seed,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        guidance_scale_2=options.guidance_scale_2,
        true_cfg_scale=options.true_cfg_scale,
        negative_prompt=options.negative_prompt,
        num_frames=options.num_frames,
        seconds=options.seconds,
        fps=options.fps,
    )


def _read(path: str) -> Pixels:
    """Raises BadRequest."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadRequest(f"image: {path}: {error.strerror}", param="image") from None
    return decoded(data, "image")


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


async def _draw(
    client: EngineClient, link: EngineThread, body: ImagesBody | VideosBody, given: list[Pixels], target: Path
) -> int:
    from rich.console import Console, Group
    from rich.live import Live
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
    console = Console(stderr=True)
    preview, bar = Preview(console), Progress(*columns, console=console)
    with Live(Group(bar, preview), console=console, transient=True) as shown:
        loading = bar.add_task("loading", total=None)
        await client.wait_ready()
        bar.remove_task(loading)
        draws, files = _wanted(client, body, given, target)
        for draw in draws:
            draw.previews = 0 if draw.film else preview.count
        begun, written = perf_counter(), list[str]()
        task = bar.add_task("steps", total=None)
        steps = dict.fromkeys((draw.id for draw in draws), 0)
        call = client.draw(draws)
        try:
            async for told in call:
                steps[told.id] = told.step
                preview.take(told)
                bar.update(task, completed=sum(steps.values()), total=told.steps * len(draws))
                seed = draws[call.order[told.id]].seed
                said = files.take(told, call.order[told.id])
                if said:  # what is finished stays, also where the next one fails
                    written.append(f"{said}, {told.steps} steps, seed {seed}")
        finally:
            shown.stop()
            files.close()
            print("\n".join(written))
    print(f"{len(draws)} in {perf_counter() - begun:.2f} s", file=sys.stderr)
    return 0


def _wanted(
    client: EngineClient, body: ImagesBody | VideosBody, given: list[Pixels], target: Path
) -> tuple[list[Draw], _Pictures | _Film]:
    """What is asked for, and what it is written by. Raises BadRequest."""
    if isinstance(body, VideosBody):
        draw, fps, _ = body.film(Facts(**client.picture_facts()))
        draw.pictures = given
        return [draw], _Film(target, fps)
    draws = body.draws()
    for draw in draws:
        draw.pictures = given
    return draws, _Pictures(target, len(draws), body.output_format or "png")


class _Pictures:
    def __init__(self, target: Path, count: int, kind: str) -> None:
        self._target, self._count, self._kind = target, count, kind

    def take(self, told: Painted, at: int) -> str:
        """What was written, if anything. Raises BadRequest."""
        if not told.done:
            return ""
        path = numbered(self._target, at, self._count)
        _write(path, write.file_of(told, self._kind, None))
        return f"{path}: {told.width}x{told.height}"

    def close(self) -> None:
        pass


class _Film:
    """A file beside the target until it is whole."""

    def __init__(self, target: Path, fps: float) -> None:
        self._target, self._fps = target, fps
        self._part = target.with_name(f".{target.name}.{os.getpid()}.part")
        self._writer: FilmWriter | None = None

    def take(self, told: Painted, at: int) -> str:
        """As that of pictures. Raises BadRequest."""
        if told.frame >= 0:
            if self._writer is None:
                self._writer = FilmWriter(self._part, told.width, told.height, self._fps, sys.maxsize)
            self._writer.add(told.pixels)
        if not told.done or self._writer is None:
            return ""
        self._writer.close()
        try:
            self._part.replace(self._target)
        except OSError as error:
            raise BadRequest(f"cannot write {self._target}: {error.strerror}") from None
        return f"{self._target}: {told.width}x{told.height}, {told.frames} frames, {told.frames / self._fps:g} s"

    def close(self) -> None:
        if self._writer is not None:
            self._writer.drop()
        self._part.unlink(missing_ok=True)


def numbered(target: Path, at: int, count: int) -> Path:
    """`cat.png`; of several, `cat-1.png` and so on."""
    if count == 1:
        return target
    stem = re.sub(r"-\d+$", "", target.stem)
    return target.with_name(f"{stem}-{at + 1}{target.suffix}")
