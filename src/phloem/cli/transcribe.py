"""Write down what is said in sound files: text, subtitles or JSON."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import phloem
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest, PhloemError
from phloem.protocol.audio.body import Format
from phloem.protocol.audio.write import cues

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

DESCRIPTION = (
    "Write down what is said in sound files, without a server: phloem transcribe FILE.. --model DIRECTORY. Transcripts "
    "go to standard output, or with --output into a directory, one file each."
)
_SOUNDS = frozenset({".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"})
_SUFFIX = {"json": "json", "verbose_json": "json", "text": "txt", "srt": "srt", "vtt": "vtt"}


@dataclass(frozen=True)
class Options:
    file: tuple[str, ...] = opt(
        (), "Sound files (wav, flac, ogg, mp3, aiff), directories of them, '-': standard input."
    )
    format: Format = opt("text", "Text, subtitles (srt, vtt), or JSON.")
    words: bool = opt(False, "When each word is said: in JSON, as a cue each, or in text as a line each (start, end).")
    output: str | None = opt(None, "Directory for the transcripts; default: standard output.")
    language: str | None = opt(None, "What is spoken; default: the model tells.")
    translate: bool = opt(False, "Into English.")
    prompt: str = opt("", "Text that came before, or names as they are to be spelled.")
    parallel: bool = opt(False, "Cut long files where they are quiet, and compute their parts together.")
    seed: int | None = opt(None, "Seed of the tries at temperatures above 0.")


def main(argv: list[str]) -> int:
    files = [word for word in argv[: _first_flag(argv)] if word]
    config, options = parse("transcribe", argv[len(files) :], Options, skip=("server",), description=DESCRIPTION)
    files += options.file
    if not files:
        raise BadRequest("there are no sound files: phloem transcribe FILE.. --model DIRECTORY")
    files = [file for name in files for file in _sounds(name)]
    if options.words and options.translate:
        raise BadRequest("--words: a translation has no words whose times could be told", param="words")
    if options.output is not None:
        _check_apart(files)
    settings = {**config.flat(), "log_level": "warning"}
    folder = _folder(options.output)
    failed = 0
    with ExitStack() as stack:
        engine = stack.enter_context(phloem.Engine(**settings))
        bar = stack.enter_context(_bar())
        for name in files:
            try:
                sound = sys.stdin.buffer.read() if name == "-" else name
                answer = engine.transcribe(sound, progress=_follow(bar, name), **_fields(options))
            except PhloemError as error:
                failed += 1
                told = error.message.removeprefix(f"{name}: ")
                print(f"phloem transcribe: {name}: {told}", file=sys.stderr)
                continue
            text = _as(answer, options.format, options.words)
            if folder is None:
                sys.stdout.write(text)
            else:
                (folder / f"{_stem(name)}.{_SUFFIX[options.format]}").write_text(text, "utf-8")
    return 1 if failed else 0


def _first_flag(argv: list[str]) -> int:
    return next((at for at, word in enumerate(argv) if word.startswith("-") and word != "-"), len(argv))


def _sounds(name: str) -> list[str]:
    """The sound files of a directory by name, not those of directories in it; any other name as it stands."""
    if name == "-" or not Path(name).is_dir():
        return [name]
    found = sorted(str(path) for path in Path(name).iterdir() if path.suffix.lower() in _SOUNDS and path.is_file())
    if not found:
        raise BadRequest(f"{name}: no sound file is in this directory (looked for {', '.join(sorted(_SOUNDS))})")
    return found


def _stem(name: str) -> str:
    return "stdin" if name == "-" else Path(name).stem


def _check_apart(files: list[str]) -> None:
    """Raises BadRequest for two files whose transcripts would have one name."""
    first: dict[str, str] = {}
    for name in files:
        other = first.setdefault(_stem(name), name)
        if other != name:
            raise BadRequest(f"output: {other} and {name} would be written to one file", param="output")


def _folder(output: str | None) -> Path | None:
    if output is None:
        return None
    folder = Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{output}: {error.strerror}") from None
    return folder


def _fields(options: Options) -> dict[str, Any]:
    return {
        "task": "translate" if options.translate else "transcribe",
        "language": options.language,
        "prompt": options.prompt,
        "chunking_strategy": "auto" if options.parallel else None,
        "seed": options.seed,
        "timestamp_granularities": ["word", "segment"] if options.words else None,
    }


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _follow(bar: Progress, name: str) -> Callable[[float, float], None]:
    task = bar.add_task(Path(name).name, total=None)

    def note(done: float, seconds: float) -> None:
        bar.update(task, completed=done, total=seconds)

    return note


def _as(answer: dict[str, Any], kind: Format, words: bool) -> str:
    if kind == "verbose_json":
        return json.dumps(answer, ensure_ascii=False) + "\n"
    if kind == "json":
        kept = {"text": answer["text"], "words": answer["words"]} if words else {"text": answer["text"]}
        return json.dumps(kept, ensure_ascii=False) + "\n"
    if words:
        timed = [(one["start"], one["end"], one["word"]) for one in answer["words"]]
        if kind == "text":
            return "".join(f"{start:.2f}\t{end:.2f}\t{word.strip()}\n" for start, end, word in timed)
        return cues(timed, kind)
    if kind == "text":
        return answer["text"] + "\n"
    return cues([(one["start"], one["end"], one["text"]) for one in answer["segments"]], kind)
