"""Names of GGUF files that lie in several parts: `model-00001-of-00003.gguf`, as `gguf-split` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


def first_part(path: Path) -> Path:
    """The part that has the metadata, of whichever part a path names; another file is its own."""
    match = _PART.fullmatch(path.stem)
    return path.with_name(f"{match[1]}-00001-of-{match[3]}{path.suffix}") if match else path


def parts_of(path: Path, count: int) -> list[Path]:
    """The names of all parts, given the first; [] where its name is not that of the first of so many."""
    match = _PART.fullmatch(path.stem)
    if match is None or int(match[2]) != 1 or int(match[3]) != count:
        return []
    return [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}{path.suffix}") for number in range(1, count + 1)]


def model_name(path: Path) -> str:
    """A file's name without what only says which part it is."""
    match = _PART.fullmatch(path.stem)
    return match[1] if match else path.stem


def models_among(paths: Iterable[Path]) -> list[Path]:
    """Files that stand for a model each: whole ones, and the first parts."""
    return sorted({first_part(path) for path in paths})
